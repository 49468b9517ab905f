"""Compare revisions of the library: how large it is, and what one call costs beside the arithmetic of its models.

    python examples/report_structure.py b8322c9 HEAD

prints tables in Markdown, from tiny random models on the CPU. Every revision is unpacked into a temporary folder and
measured in a process of its own with its own `tests/factories.py`, so that `transformers` must be a version that all
of them support. Nothing is downloaded.

What is counted, and where a CPU cannot tell what an accelerator would do:

- *operations*: of aten, the model's and those of plans on the host alike, since all are on one device here;
- *reads*: operations that wait for a device to tell a number, `_local_scalar_dense` and `nonzero`. Those of plans,
  whose tensors are on the host in any case, count as well;
- *transfers*: calls of `to_host`; *copies*: calls of `to_device`, and of `Tensor.to` with `non_blocking=True` outside
  of it, each one copy to an accelerator unless the tensor is there already;
- *host time*: from the return of the first `to_host` to the first layer of the language model, without what an
  accelerator computes: the tower, all modules (connectors, router, rotary embeddings), and AVG-LLaVA's pooling and
  text filter, which are functions. Widths are tiny; gathers of states are included, and so is a CPU's time for them;
- *idle time*: the same from the return of the last `to_host`, for which an accelerator has done all that it was given,
  so that it waits for the host meanwhile; in a call without and with gradients.
"""

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

BUDGETS = ("auto", "full", 0.5)
REFUSED = "refused"
GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 500
# eight images of five tiles of 24 x 24 tokens, or of one map of about as many
NUM_IMAGES, NUM_TILES, TILE_SIDE = 8, 5, 24
REPEATS = 25
# what an accelerator computes outside of modules
DEVICE_FUNCTIONS = ("pool_pyramid", "filter_text")
# so narrow that gathers of states are cheap
TEXT_WIDTH = 8


def sizes_of_sources(folder: Path) -> dict[str, int]:
    """Lines, carriers, long functions and long files of `hf_vtc/models` of an unpacked revision."""
    sizes: Counter[str] = Counter()
    for file in sorted((folder / "hf_vtc" / "models").glob("*.py")):
        source = file.read_text(encoding="utf-8")
        num_lines = len(source.splitlines())
        sizes["lines"] += num_lines
        sizes["files"] += 1
        sizes["long_files"] += num_lines > MAX_FILE_LINES
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                sizes["long_functions"] += node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
            elif isinstance(node, ast.ClassDef):
                marks = [ast.unparse(mark).split("(")[0] for mark in (*node.bases, *node.decorator_list)]
                sizes["carriers"] += bool({"NamedTuple", "dataclass"} & set(marks))
    return dict(sizes)


def modules_of_models() -> list[Any]:
    return [module for name, module in sorted(sys.modules.items()) if name.startswith("hf_vtc.models.")]


@contextmanager
def replaced(name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace a function of `hf_vtc.models` wherever it is imported by name; nothing where there is none."""
    with ExitStack() as stack:
        for module in modules_of_models():
            if name in vars(module):
                stack.enter_context(patch.object(module, name, make(vars(module)[name])))
        yield


@contextmanager
def counted() -> Iterator[Counter]:
    """Count what is run inside."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    counts: Counter[str] = Counter()
    reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
    inside = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts["operations"] += 1
            counts["reads"] += func in reads
            return func(*args, **(kwargs or {}))

    class Copies(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            counts["copies"] += func is torch.Tensor.to and bool(kwargs.get("non_blocking")) and not inside
            return func(*args, **kwargs)

    def as_transfer(function: Callable) -> Callable:
        @wraps(function)
        def transfer(*tensors):
            counts["transfers"] += bool(tensors)
            return function(*tensors)

        return transfer

    def as_copy(function: Callable) -> Callable:
        @wraps(function)
        def copy(device, *tensors):
            counts["copies"] += any(tensor is not None for tensor in tensors)
            inside.append(function)
            try:
                return function(device, *tensors)
            finally:
                inside.pop()

        return copy

    with replaced("to_host", as_transfer), replaced("to_device", as_copy), Copies(), Operations():
        yield counts


@contextmanager
def carriers_made() -> Iterator[set[str]]:
    """Names of the dataclasses and named tuples of `hf_vtc.models` that are made inside."""
    made: set[str] = set()

    def noting(cls: type, function: Callable) -> Callable:
        @wraps(function)
        def note(*args, **kwargs):
            made.add(cls.__name__)
            return function(*args, **kwargs)

        return note

    with ExitStack() as stack:
        for module in modules_of_models():
            for cls in vars(module).values():
                if not isinstance(cls, type) or cls.__module__ != module.__name__:
                    continue
                if "__dataclass_fields__" in vars(cls):
                    stack.enter_context(patch.object(cls, "__init__", noting(cls, cls.__init__)))
                elif "_fields" in vars(cls):
                    stack.enter_context(patch.object(cls, "__new__", noting(cls, cls.__new__)))
        yield made


def of_budgets(measure: Callable[[Any], Any]) -> dict[str, Any]:
    """What `measure` says at each budget; a method may refuse one."""
    found = {}
    for budget in BUDGETS:
        try:
            found[str(budget)] = measure(budget)
        except ValueError:
            found[str(budget)] = REFUSED
    return found


def counts_of_steps(model: Any, inputs: dict[str, Any]) -> list[Counter]:
    """Counts of each forward pass of `generate`."""
    steps, forward = [], model.forward

    @wraps(forward)
    def step(*args, **kwargs):
        with counted() as counts:
            out = forward(*args, **kwargs)
        steps.append(counts)
        return out

    with patch.object(model, "forward", step):
        model.generate(**inputs, **GREEDY)
    return steps


def counts_of_method(method: str) -> dict[str, Any]:
    """Counts of a prefill and of a decoded token at each budget, and the carriers that are made for both."""
    import factories
    import torch

    model = factories.tiny_model(method)
    generator = torch.Generator().manual_seed(51)
    inputs = dict(factories.random_batch(model.config, generator, num_rows=1, images_per_row=[2]))

    def measure(budget: Any) -> dict[str, Any]:
        asked = {**inputs, "vtc_budget": budget}
        with torch.no_grad():
            # the first call fills caches
            model(**asked, use_cache=True)
            with counted() as prefill:
                model(**asked, use_cache=True)
            with carriers_made() as carriers:
                model(**asked, use_cache=True)
        return {"prefill": prefill, "token": counts_of_steps(model, asked)[-1], "carriers": sorted(carriers)}

    return {"length": inputs["input_ids"].shape[1], **of_budgets(measure)}


def counts_of_stock_token() -> Counter:
    """Counts of a decoded token of a plain language model, that of the first method."""
    import factories
    import torch
    from transformers import AutoModelForCausalLM

    config = factories.tiny_config(factories.METHODS[0]).text_config
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    return counts_of_steps(AutoModelForCausalLM.from_config(config).eval(), text)[-1]


def long_images(method: str) -> tuple[Any, dict[str, Any]]:
    """A model of tiny widths and one prompt with eight images of about 2880 visual tokens each."""
    import factories
    import torch

    template = factories.tiny_config(method)
    text = {**template.text_config.to_dict(), "hidden_size": TEXT_WIDTH, "max_position_embeddings": 1 << 15}
    vision = template.vision_config.to_dict()
    fields: dict[str, Any] = {}
    images = factories.images_of(template)
    if isinstance(images, factories.SizedImages):
        stride = template.token_stride
        height, width = 40 * stride, 72 * stride
        inputs = {
            "pixel_values": torch.zeros(NUM_IMAGES, 3, height, width),
            "image_sizes": torch.tensor([[height, width]] * NUM_IMAGES),
        }
        reserved = 40 * 72
    else:
        # pixel shuffle makes one token of two by two patches
        side = TILE_SIDE * vision_patch(vision) * (2 if vision["model_type"] == "internvl_vision" else 1)
        vision["image_size"] = [side, side] if isinstance(vision["image_size"], (list, tuple)) else side
        inputs = {
            "pixel_values": torch.randn(NUM_IMAGES * NUM_TILES, 3, side, side),
            "num_tiles": torch.full((NUM_IMAGES,), NUM_TILES),
        }
        reserved = NUM_TILES * TILE_SIDE**2
        if isinstance(images, factories.AnyresImages):
            fields["image_grid_pinpoints"] = [[2 * side, 2 * side]]
            inputs["image_sizes"] = torch.tensor([[2 * side, 2 * side]] * NUM_IMAGES)
            reserved = TILE_SIDE**2 + 2 * TILE_SIDE * (2 * TILE_SIDE + 1)
    model = factories.tiny_model(method, vision_config=vision, text_config=text, **fields)
    image = [5, *[model.config.image_token_id] * reserved]
    inputs["input_ids"] = torch.tensor([image * NUM_IMAGES + [7, 9]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model, inputs


def vision_patch(vision: dict[str, Any]) -> int:
    size = vision["patch_size"]
    return size if isinstance(size, int) else size[0]


class FirstLayer(Exception):
    """The language model has begun."""


class HostClock:
    """Seconds from the first transfer to the first layer of the language model, without those in modules."""

    def __init__(self, model: Any):
        self.decoder = model.model.language_model
        self.parts = set(model.modules()) - {model, model.model, self.decoder}
        self.arrived = self.away = self.entered = self.seconds = None
        self.last_arrived = self.last_away = self.idle_seconds = None
        self.depth = 0

    def as_start(self, function: Callable) -> Callable:
        @wraps(function)
        def start(*tensors):
            arrived = function(*tensors)
            now = time.perf_counter()
            if self.arrived is None:
                self.arrived, self.away = now, 0.0
            if tensors:
                self.last_arrived, self.last_away = now, self.away
            return arrived

        return start

    def enter(self, module: Any, args: Any) -> None:
        if module in self.parts and self.arrived is not None:
            self.depth += 1
            if self.depth == 1:
                self.entered = time.perf_counter()

    def leave(self, module: Any, args: Any, out: Any) -> None:
        if module in self.parts and self.depth:
            self.depth -= 1
            if self.depth == 0:
                self.away += time.perf_counter() - self.entered

    def as_device_work(self, function: Callable) -> Callable:
        @wraps(function)
        def work(*args, **kwargs):
            entered = time.perf_counter()
            out = function(*args, **kwargs)
            if self.arrived is not None and not self.depth:
                self.away += time.perf_counter() - entered
            return out

        return work

    def stop(self, module: Any, args: Any) -> None:
        now = time.perf_counter()
        self.seconds = now - self.arrived - self.away
        self.idle_seconds = now - self.last_arrived - (self.away - self.last_away)
        raise FirstLayer


def host_seconds(model: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the host from the first and from the last transfer to the first layer of the language model."""
    from torch.nn.modules import module as hooks

    clock = HostClock(model)
    handles = [
        hooks.register_module_forward_pre_hook(clock.enter),
        hooks.register_module_forward_hook(clock.leave),
        clock.decoder.layers[0].register_forward_pre_hook(clock.stop),
    ]
    try:
        with ExitStack() as stack:
            stack.enter_context(replaced("to_host", clock.as_start))
            for name in DEVICE_FUNCTIONS:
                stack.enter_context(replaced(name, clock.as_device_work))
            model(**inputs, use_cache=False)
    except FirstLayer:
        return clock.seconds, clock.idle_seconds
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError("No layer of the language model ran.")


def run_once(function: Callable) -> Callable:
    """Give what the first call gave at every later one."""
    results: list[Any] = []

    @wraps(function)
    def remembered(*args, **kwargs):
        if not results:
            results.append(function(*args, **kwargs))
        return results[0]

    return remembered


def host_milliseconds(method: str) -> dict[str, Any]:
    """Host and idle time of a prefill at each budget, and of a call with gradients at `"auto"`.

    The first call fills caches and runs tower and router. Later ones are given what these found: half a second of
    arithmetic would leave a CPU's caches cold to the host.
    """
    import torch

    model, inputs = long_images(method)

    def measure(budget: Any, train: bool = False) -> dict[str, float]:
        asked = {**inputs, "vtc_budget": budget}
        with torch.set_grad_enabled(train), ExitStack() as stack:
            stack.enter_context(patch.object(model.model, "encode", run_once(model.model.encode)))
            if hasattr(model.model, "router"):
                router = model.model.router
                stack.enter_context(patch.object(router, "forward", run_once(router.forward)))
            model.train(train)
            host_seconds(model, asked)
            seconds, idle = zip(*(host_seconds(model, asked) for _ in range(REPEATS)), strict=True)
        return {
            "least": 1e3 * min(seconds),
            "median": 1e3 * statistics.median(seconds),
            "idle": 1e3 * statistics.median(idle),
        }

    return {**of_budgets(measure), "training": measure("auto", train=True)}


def measured() -> dict[str, Any]:
    """All that takes a running library, of the revision whose folders are on the path."""
    import factories
    import torch

    import hf_vtc  # noqa: F401  registers the classes

    torch.set_num_threads(1)
    return {
        "stock_token": counts_of_stock_token(),
        "counts": {method: counts_of_method(method) for method in factories.METHODS},
        "host": {method: host_milliseconds(method) for method in factories.METHODS},
    }


def report_of(revision: str) -> dict[str, Any]:
    """Everything about one revision of the repository that holds this script."""
    with tempfile.TemporaryDirectory() as name:
        folder, repository = Path(name), Path(__file__).resolve().parents[1]
        archive = folder / "revision.tar"
        subprocess.run(["git", "archive", "-o", str(archive), revision], cwd=repository, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        path = os.pathsep.join([str(folder), str(folder / "tests")])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", __file__, "--measure"]
        answer = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return {"sizes": sizes_of_sources(folder), **json.loads(answer.stdout.splitlines()[-1])}


def as_table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def counts_in_words(counts: dict[str, int]) -> str:
    names = ("operations", "reads", "transfers", "copies")
    return " / ".join(str(counts.get(name, 0)) for name in names)


def printed(reports: dict[str, dict[str, Any]]) -> str:
    """The tables in Markdown."""
    revisions, first = list(reports), next(iter(reports.values()))
    labels = {
        "files": "files of `hf_vtc/models`",
        "lines": "lines",
        "carriers": "dataclasses and named tuples",
        "long_functions": f"functions over {MAX_FUNCTION_LINES} lines",
        "long_files": f"files over {MAX_FILE_LINES} lines",
    }
    sizes = [[label, *(report["sizes"].get(key, 0) for report in reports.values())] for key, label in labels.items()]
    counts, carriers, times, idle = [], [], [], []
    for method in first["counts"]:
        for budget in map(str, BUDGETS):
            found = [report["counts"][method][budget] for report in reports.values()]
            for what in ("prefill", "token"):
                cells = [REFUSED if each == REFUSED else counts_in_words(each[what]) for each in found]
                counts.append([f"`{method}`", budget, what, *cells])
            made = [REFUSED if each == REFUSED else len(each["carriers"]) for each in found]
            carriers.append([f"`{method}`", budget, *made])
            spent = [report["host"][method][budget] for report in reports.values()]
            cells = [REFUSED if each == REFUSED else f"{each['least']:.1f} ({each['median']:.1f})" for each in spent]
            times.append([f"`{method}`", budget, *cells])
        for label, key in {"auto": "auto", "auto, with gradients": "training"}.items():
            idle.append(
                [f"`{method}`", label, *(f"{each['host'][method][key]['idle']:.1f}" for each in reports.values())]
            )
    stock = [counts_in_words(report["stock_token"]) for report in reports.values()]
    counts.append(["plain language model", "", "token", *stock])
    return "\n\n".join(
        [
            as_table(["", *revisions], sizes),
            "Operations / reads / transfers / copies:",
            as_table(["method", "budget", "of a", *revisions], counts),
            "Carriers made in a call of `forward`, outputs included:",
            as_table(["method", "budget", *revisions], carriers),
            f"Host milliseconds, least (median) of {REPEATS} calls:",
            as_table(["method", "budget", *revisions], times),
            f"Milliseconds from the last transfer on, in which an accelerator waits, median of {REPEATS} calls:",
            as_table(["method", "budget", *revisions], idle),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revisions", nargs="*", help="of this repository, oldest first")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured()))
        return
    if not arguments.revisions:
        parser.error("give at least one revision, such as HEAD")
    print(printed({revision: report_of(revision) for revision in arguments.revisions}))


if __name__ == "__main__":
    main()
