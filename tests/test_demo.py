"""The page in the browser: what it answers, refuses and hides, in a real Chromium and by its programming interface.

    pip install -e ".[test,test_demo]" && pytest -m demo tests/test_demo.py

Chromium and its driver come from the system (Debian: `apt-get install chromium chromium-driver`).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_vtc_cli.app import app

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[test_demo]'")
httpx = pytest.importorskip("httpx")

pytestmark = pytest.mark.demo

ROOT = Path(__file__).resolve().parents[1]
PAGES = json.loads((ROOT / "examples" / "images" / "pages.json").read_text(encoding="utf-8"))
# the command in a process whose connections to other machines are refused and written down
SERVER = """
import socket, sys
others, connect = open(sys.argv[1], "a", buffering=1), socket.socket.connect
def connect_here(self, address):
    host = address[0] if isinstance(address, tuple) else ""
    if host not in ("", "127.0.0.1", "::1", "localhost"):
        print(host, file=others)
        raise OSError(f"no way to {host}")
    return connect(self, address)
socket.socket.connect = connect_here
resolve = socket.getaddrinfo
def resolve_here(host, *args, **kwargs):
    if host not in (None, "", "127.0.0.1", "::1", "localhost"):
        print(host, file=others)
        raise OSError(f"no address of {host}")
    return resolve(host, *args, **kwargs)
socket.getaddrinfo = resolve_here
sys.argv = ["hf-vtc", *sys.argv[2:]]
from hf_vtc_cli import main
main()
"""


class Server:
    """`hf-vtc demo`, running."""

    def __init__(self, folder: Path, *options: str):
        self.others = folder / "others.txt"
        self.others.touch()
        self.log = (folder / "log.txt").open("w+")
        command = [sys.executable, "-c", SERVER, str(self.others), "demo", "--port", "0", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(folder / "uploads")}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        # loading may take a while on a busy machine; `pytest-timeout` ends what never comes
        self.line = self.process.stdout.readline()
        assert self.line.startswith("http://"), (self.line, Path(self.log.name).read_text())
        self.address = self.line.split()[0]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("demo"), "--max-new-tokens", "8", "--max-upload", "1")
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(server):
    return pytest.importorskip("gradio_client").Client(server.address, verbose=False, analytics_enabled=False)


def asked(client, image, question, percent=50, decides=False):
    handle = pytest.importorskip("gradio_client").handle_file
    return client.submit(None if image is None else handle(str(image)), question, percent, decides, api_name="/ask")


def page_and_question(page_idx, question_idx):
    page = PAGES[page_idx]
    return ROOT / "examples" / "images" / page["image"], page["questions"][question_idx]


def test_page_answers_by_its_interface(client):
    image, expected = page_and_question(0, 2)
    # what users who ask by program are given; the rest is the page's own business
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/ask"]
    full, full_facts, full_picture, kept, facts, picture = asked(client, image, expected["question"]).result()
    assert full == kept == expected["answer"]
    assert full_facts.startswith("144 of 144 visual tokens") and facts.startswith("72 of 144 visual tokens")
    assert full_picture != picture and f'alt="What the language model sees: {facts}"' in picture
    decided = asked(client, image, expected["question"], decides=True).result()
    assert decided[4].startswith("60 of 144 visual tokens")


def answer_to_a_visitor(address, image, question, percent):
    """The full answer as one visitor gets it: upload, question, and the stream of what becomes of it."""
    with httpx.Client(trust_env=False, timeout=300) as http:
        (path,) = http.post(f"{address}gradio_api/upload", files={"files": (image.name, image.read_bytes())}).json()
        upload = {"path": path, "meta": {"_type": "gradio.FileData"}}
        call = f"{address}gradio_api/call/ask"
        event = http.post(call, json={"data": [upload, question, percent, False]}).json()["event_id"]
        said = http.get(f"{call}/{event}").text
    assert "event: complete" in said, said
    return json.loads(said.rsplit("data: ", 1)[1])[0]


def test_fifty_questions_at_once_are_all_answered(server):
    asking = []
    with ThreadPoolExecutor(50) as pool:
        for number in range(50):
            image, expected = page_and_question(number % 4, number % 3)
            job = pool.submit(answer_to_a_visitor, server.address, image, expected["question"], 40 + number)
            asking.append((expected["answer"], job))
    assert [job.result() for _, job in asking] == [answer for answer, _ in asking]


@pytest.mark.parametrize(
    "name, question, percent, message",
    [
        (None, "What?", 50, "Choose a picture first."),
        ("form_1.png", "  ", 50, "Write a question first."),
        ("form_1.png", "What?", 1, "smallest admissible count is 36"),
        ("form_1.png", "What?", None, "Choose a budget from 1 to 100 percent."),
        ("form_1.png", "What?", 150, "Choose a budget from 1 to 100 percent."),
        ("broken.png", "What?", 50, "This picture cannot be read: "),
        ("bomb.png", "What?", 50, "This picture cannot be read: "),
    ],
)
def test_page_refuses_in_sentences(client, tmp_path, name, question, percent, message):
    path = None if name is None else ROOT / "examples" / "images" / name
    if name == "broken.png":
        path = tmp_path / name
        path.write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    if name == "bomb.png":
        path = tmp_path / name
        Image.new("1", (30_000, 30_000)).save(path)
    with pytest.raises(Exception, match=message) as caught:
        asked(client, path, question, percent).result()
    # where an upload lies is nobody's business
    assert "uploads" not in str(caught.value)


def test_page_reads_uploads_only(server):
    # a file of this machine, named by whoever asks
    image, expected = page_and_question(0, 2)
    with httpx.Client(trust_env=False, timeout=300) as http:
        for path in (str(image), "/etc/hostname"):
            call, upload = f"{server.address}gradio_api/call/ask", {"path": path, "meta": {"_type": "gradio.FileData"}}
            event = http.post(call, json={"data": [upload, expected["question"], 50, False]}).json()["event_id"]
            said = http.get(f"{call}/{event}").text
            assert "event: error" in said and "event: complete" not in said


def test_upload_has_a_limit(server):
    with httpx.Client(trust_env=False) as http:
        sizes = [
            http.post(f"{server.address}gradio_api/upload", files={"files": ("a.png", bytes(size))}).status_code
            for size in (900_000, 1_200_000)
        ]
    assert sizes == [200, 413]


def test_page_is_on_loopback_only(server):
    assert "Only this machine reaches it" in server.line
    port = server.address.rstrip("/").rsplit(":", 1)[1]
    with httpx.Client(trust_env=False) as http:
        assert http.get(f"http://127.0.0.1:{port}/").status_code == 200
        # also an address of this machine, of which a server for everyone would hear
        with pytest.raises(httpx.ConnectError):
            http.get(f"http://127.0.0.2:{port}/")


def test_other_files_are_not_served(server):
    with httpx.Client(trust_env=False) as http:
        for path in ("/etc/passwd", ROOT / "setup.cfg", ROOT / "model_cards" / "vico-tiny" / "config.json"):
            assert http.get(f"{server.address}gradio_api/file={path}").status_code in (403, 404)


def test_a_port_that_is_taken_is_one_line(server):
    port = server.address.rstrip("/").rsplit(":", 1)[1]
    result = CliRunner().invoke(app, ["demo", "--port", port])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and port in result.stderr


def test_a_host_that_is_open_is_said_aloud(tmp_path):
    running = Server(tmp_path, "--host", "0.0.0.0")
    try:
        assert "EVERYONE WHO REACHES THIS MACHINE CAN USE IT" in running.line
    finally:
        running.close()


def test_without_gradio_one_line_says_what_to_install(run_python):
    script = """
import sys
sys.modules["gradio"] = None
from typer.testing import CliRunner
from hf_vtc_cli.app import app
result = CliRunner().invoke(app, ["demo"])
print(result.exit_code, result.stderr)
"""
    text = run_python(script, installed=True)
    assert text.startswith("2 Error: The demo page needs gradio: pip install 'hf_vtc[demo]'.")


def test_the_space_is_the_same_page(tmp_path, client):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_SERVER_PORT": "0", "GRADIO_TEMP_DIR": str(tmp_path)}
    environment.pop("MODEL", None)
    command = [sys.executable, ROOT / "examples" / "space" / "app.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            with httpx.Client(trust_env=False) as http:
                pages = [http.get(f"{each}config").json() for each in (address, client.src)]
            shown = [[(each["type"], each["props"].get("label")) for each in page["components"]] for page in pages]
            assert shown[0] == shown[1]
        finally:
            process.terminate()


def test_the_space_names_what_it_needs():
    space = ROOT / "examples" / "space"
    head = (space / "README.md").read_text(encoding="utf-8").split("---")[1]
    fields = dict(line.split(": ", 1) for line in head.strip().splitlines())
    assert fields["sdk"] == "gradio" and (space / fields["app_file"]).is_file()
    assert "hf_vtc[demo] @ " in (space / "requirements.txt").read_text(encoding="utf-8")
    # the Hub takes no longer one
    assert len(fields["short_description"]) <= 60


@pytest.fixture(params=[1280, 390])
def browser(request, tmp_path):
    """A real Chromium of so many pixels width, and what it asked the network for."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("Chromium or its driver is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    size = {"width": request.param, "height": 1800, "deviceScaleFactor": 1, "mobile": request.param < 500}
    running.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield running
    running.quit()


class Visitor:
    """What a user does and sees."""

    def __init__(self, browser):
        self.browser = browser

    def wait(self, what, seconds=120):
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := what():
                    return found
            except StaleElementReferenceException:
                # the page has drawn this anew while it was looked at
                pass
            time.sleep(0.1)
        raise AssertionError("the page does not show what is expected")

    def use(self, label, action):
        """Do something with a control, once it is there; an action that a new drawing interrupts is done again."""
        self.wait(lambda: (control := self.labelled(label)) and (action(control), True))

    def labelled(self, label):
        """The control of this name, as a screen reader finds it."""
        controls = self.browser.find_elements("css selector", "input, textarea, button")
        found = [each for each in controls if each.is_displayed() and each.accessible_name == label]
        return found[0] if len(found) == 1 else None

    def value(self, label):
        control = self.labelled(label)
        return control and control.get_attribute("value")

    def pictures(self):
        drawn = self.browser.find_elements("css selector", "img[alt^='What the language model sees']")
        return [(each.get_attribute("alt"), each.get_attribute("src")) for each in drawn]

    def click(self, label):
        self.use(label, lambda control: control.click())

    def write(self, label, text):
        self.use(label, lambda control: (control.clear(), control.send_keys(text)))

    def sides(self):
        """Both answers and what is said of their tokens, once all is there."""
        names = [
            f"{side}: {what}"
            for side in ("Every visual token", "Compressed")
            for what in ("answer", "tokens and time")
        ]
        return [self.value(name) for name in names]


@pytest.mark.timeout(900)
def test_a_visit(server, browser, tmp_path):
    visitor = Visitor(browser)
    browser.get(server.address)
    visitor.wait(lambda: visitor.labelled("Ask"))

    # a picture and a question of one's own
    image, expected = page_and_question(3, 2)
    visitor.click("Remove Image")
    visitor.wait(
        lambda: [
            (upload.send_keys(str(image)), True)
            for upload in browser.find_elements("css selector", "input[type=file]")
        ]
    )
    visitor.wait(lambda: visitor.labelled("Remove Image"))
    visitor.write("Question", expected["question"])
    visitor.click("Ask")
    visitor.wait(lambda: all(visitor.sides()) and len(visitor.pictures()) == 2)
    full, full_facts, kept, facts = visitor.wait(visitor.sides)
    assert full == kept == expected["answer"]
    assert full_facts.startswith("144 of 144 visual tokens, ") and facts.startswith("72 of 144 visual tokens, ")
    before = visitor.wait(visitor.pictures)
    assert before[0][1] != before[1][1]

    # the budget moves: by the keyboard, as a slider does for everyone
    arrow_left = "\ue012"
    visitor.use(
        "range slider for Budget: percent of the visual tokens", lambda slider: slider.send_keys(arrow_left * 20)
    )
    visitor.wait(lambda: (visitor.sides()[3] or "").startswith("36 of 144 visual tokens, "))
    visitor.wait(lambda: visitor.pictures()[1][1] != before[1][1])
    assert visitor.wait(visitor.pictures)[0][1] == before[0][1]
    # what the method decides
    visitor.click("Let the method decide instead (auto)")
    visitor.wait(lambda: not (visitor.sides()[3] or "36 of").startswith("36 of"))

    # a mistake is a sentence
    visitor.write("Question", " ")
    visitor.click("Ask")
    visitor.wait(lambda: "Write a question first." in browser.find_element("tag name", "body").text)

    _assert_fits_and_is_labelled(browser)
    browser.save_screenshot(str(tmp_path / "page.png"))
    assert _hosts_asked(browser) == {server.address.split("/")[2]}
    # nor did the server ask another machine
    assert server.others.read_text() == ""


def _assert_fits_and_is_labelled(browser):
    script = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wide, seen = browser.execute_script(script)
    assert wide <= seen
    roles = ("button", "textbox", "slider", "spinbutton", "checkbox", "radio", "link", "combobox", "switch", "tab")
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in nodes
        if not node.get("ignored") and node.get("role", {}).get("value") in roles
    ]
    assert len(controls) >= 8
    assert [role for role, name in controls if not name] == []


def _hosts_asked(browser):
    """Hosts that the page has asked for something; what Chromium itself shows in a new tab is none of them."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    return {
        url.split("/")[2] for url in urls if url.split(":")[0] not in ("data", "blob", "chrome", "chrome-untrusted")
    }
