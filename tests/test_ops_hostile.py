"""No argument of an op leads its compiled kernel out of the memory of its tensors; see `ops/hostile.py`."""

from pathlib import Path

import pytest
from ops.hostile import NAMED, VALID, drawn, unexpected
from ops.sanitizers import FLAGS, run_sanitized, run_script, sanitizer_library

from hf_vtc.ops import build
from hf_vtc.ops.recipe import Recipe


def test_hostile_arguments_are_refused_or_mean_what_they_say(compiled_cpu):
    result = run_script("hostile.py", compiled_cpu)
    assert result.returncode == 0, result.stderr[-4000:]
    assert not unexpected(result.stdout, traps=False)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """The CPU kernels with sanitizers, by the project's own builder."""
    folder = tmp_path_factory.mktemp("sanitized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", " ".join(("g++", "-g1", *FLAGS)))
        return build.build_into(Recipe("cpu"), folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sanitizer_library() is None, reason="needs g++ with its address sanitizer")
def test_hostile_arguments_under_the_sanitizers(sanitized):
    result = run_sanitized("hostile.py", sanitized)
    assert result.returncode == 0, result.stderr[-4000:]
    assert not unexpected(result.stdout, traps=False)


def test_every_op_has_hostile_arguments_and_the_drawn_ones_repeat():
    cases = [*NAMED, *drawn()]
    assert len({case.name for case in cases}) == len(cases) > 500
    assert {case.op for case in cases if case.refused} == VALID.keys()
    assert [case.name for case in drawn()] == [case.name for case in drawn()]
