"""Alerts reach real servers and programs, and none of these can hold up who sends them."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from stableopd.config import StableOPDConfig
from stableopd.config_files import check_resumable, dump_config, flatten
from stableopd.errors import ConfigError
from stableopd.notify import QUEUE_SIZE, Notifier, payload, url_problem
from stableopd.types import Alert

SECRET = "T0KEN-that-nobody-may-see"


def alert(step: int = 7, **changes) -> Alert:
    fields = {
        "rule": "loops", "severity": "critical", "signal": "health/loop_token_fraction", "value": 0.4,
        "threshold": 0.2, "step": step, "since": 5, "message": "40% of all tokens lie in exact loops.",
    }  # fmt: skip
    return Alert(**{**fields, **changes})


class Server(ThreadingHTTPServer):
    daemon_threads = True
    behaviour = "answer"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[bytes] = []
        self.arrived, self.released = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook/{SECRET}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.arrived.set()
        behaviour = self.server.behaviour
        if behaviour == "hang":
            self.server.released.wait(30)
        elif behaviour == "drip":  # a byte now and then: no single read ever times out
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not self.server.released.wait(0.05):
                self.wfile.write(b"X")
        elif behaviour == "redirect":
            self.send_response(307)
            self.send_header("Location", f"ftp://127.0.0.1/{SECRET}")
            self.end_headers()
        else:
            self.send_response(500 if behaviour == "fail" else 200)
            self.end_headers()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # a proxy of this machine is not what is tested
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def script(tmp_path):
    def script(code: str) -> list[str]:
        path = tmp_path / "tell.py"
        path.write_text(code)
        return [sys.executable, str(path)]

    return script


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_webhook_gets_the_alert_the_run_and_a_text(server):
    notifier = Notifier("first", url=server.url)
    notifier.send([alert()])
    notifier.close()
    (body,) = server.bodies
    told = json.loads(body)
    assert told["run"] == "first"
    assert told["text"] == "first: critical at step 7, loops: 40% of all tokens lie in exact loops."
    assert {key: told[key] for key in alert().to_json()} == alert().to_json()
    assert (notifier.num_sent, notifier.num_failed) == (1, 0)


def test_alerts_arrive_in_order_and_all_of_them_before_the_end(server):
    notifier = Notifier("first", url=server.url)
    for step in range(20):
        notifier.send([alert(step)])
    notifier.close()
    assert [json.loads(body)["step"] for body in server.bodies] == list(range(20))


def test_alerts_below_the_least_severity_are_not_sent(server):
    notifier = Notifier("first", url=server.url, min_severity="critical")
    notifier.send([alert(severity="info"), alert(severity="warning"), alert(severity="critical")])
    notifier.close()
    assert [json.loads(body)["severity"] for body in server.bodies] == ["critical"]


def test_figures_that_are_not_finite_make_valid_json():
    told = payload(alert(value=math.nan, threshold=math.inf), "first")
    assert json.loads(json.dumps(told, allow_nan=False))["value"] is None


def test_an_action_is_named_in_the_text():
    assert "[rollback]" in payload(alert(rule="controller", action="rollback"), "first")["text"]


@pytest.mark.parametrize("behaviour", ["hang", "drip"])
def test_a_server_that_does_not_answer_holds_up_nobody(server, caplog, behaviour):
    server.behaviour = behaviour
    notifier = Notifier("first", url=server.url, timeout_s=0.3)
    begin = time.monotonic()
    for step in range(5):
        notifier.send([alert(step)])
    assert time.monotonic() - begin < 0.2
    assert server.arrived.wait(5)
    notifier.close()
    assert time.monotonic() - begin < 3.0
    assert SECRET not in caplog.text


def test_a_failure_is_said_once_and_without_the_url(server, caplog):
    server.behaviour = "fail"
    notifier = Notifier("first", url=server.url)
    notifier.send([alert(step) for step in range(4)])
    notifier.close()
    assert len(server.bodies) == 4, "a failure does not end the attempts"
    assert notifier.num_failed == 4
    (message,) = warnings_of(caplog)
    assert "it answered 500" in message
    assert SECRET not in caplog.text
    assert "127.0.0.1" not in caplog.text


def test_a_timeout_is_said_with_its_limit(server, caplog):
    server.behaviour = "hang"
    notifier = Notifier("first", url=server.url, timeout_s=0.2)
    notifier.send([alert()])
    deadline = time.monotonic() + 5
    while not notifier.num_failed and time.monotonic() < deadline:
        time.sleep(0.02)
    notifier.close()
    assert "no answer within 0.2 s" in warnings_of(caplog)[0] or "TimeoutError" in warnings_of(caplog)[0]


def test_redirects_are_not_followed(server, caplog):
    server.behaviour = "redirect"
    notifier = Notifier("first", url=server.url)
    notifier.send([alert()])
    notifier.close()
    assert "a redirect, which is not followed" in caplog.text
    assert SECRET not in caplog.text


def test_nobody_listening_is_a_short_message(server, caplog):
    url = server.url
    server.shutdown()
    server.server_close()
    notifier = Notifier("first", url=url)
    notifier.send([alert()])
    notifier.close()
    assert "ConnectionRefusedError" in warnings_of(caplog)[0]
    assert SECRET not in caplog.text


def test_the_url_comes_from_the_named_variable(server, monkeypatch):
    monkeypatch.setenv("HOOK", server.url)
    notifier = Notifier("first", url_env="HOOK")
    notifier.send([alert()])
    notifier.close()
    assert len(server.bodies) == 1


@pytest.mark.parametrize("value", [None, "", f"file:///etc/{SECRET}", f"javascript:{SECRET}"])
def test_an_unset_or_impossible_variable_is_said_and_stops_nothing(monkeypatch, caplog, value):
    monkeypatch.delenv("HOOK", raising=False)
    if value is not None:
        monkeypatch.setenv("HOOK", value)
    notifier = Notifier("first", url_env="HOOK")
    notifier.send([alert()])
    notifier.close()
    (message,) = warnings_of(caplog)
    assert "HOOK" in message
    assert SECRET not in message


def test_a_command_gets_the_alert_on_its_standard_input(script, tmp_path):
    command = script("import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')")
    notifier = Notifier("first", command=[*command, str(tmp_path / "got; touch injected")])
    notifier.send([alert(1), alert(2)])
    notifier.close()
    lines = (tmp_path / "got; touch injected").read_text().splitlines()  # no shell took the name apart
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_command_that_hangs_is_killed_with_its_children(script, tmp_path, caplog):
    command = script(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    notifier = Notifier("first", command=[*command, str(tmp_path / "child")], timeout_s=2.0)
    notifier.send([alert()])
    deadline = time.monotonic() + 20
    while not notifier.num_failed and time.monotonic() < deadline:
        time.sleep(0.05)
    notifier.close()
    assert "took more than 2 s and was killed" in warnings_of(caplog)[0]
    assert not is_running(int((tmp_path / "child").read_text()))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_end_of_the_run_kills_a_command_that_still_runs(script, tmp_path):
    command = script("import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)")
    notifier = Notifier("first", command=[*command, str(tmp_path / "pid")], timeout_s=30.0)
    notifier.send([alert()])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    notifier.timeout_s = 0.2  # the wait at the end; the command's own limit stays
    begin = time.monotonic()
    notifier.close()
    assert time.monotonic() - begin < 3.0
    deadline = time.monotonic() + 5
    while is_running(int((tmp_path / "pid").read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_missing_command_is_said_once_and_stops_nothing(caplog):
    notifier = Notifier("first", command=["no-such-program-anywhere", SECRET])
    notifier.send([alert(1), alert(2)])
    notifier.close()
    (message,) = warnings_of(caplog)
    assert "there is no such program" in message
    assert SECRET not in message


def test_a_command_that_fails_says_its_status(script, caplog):
    notifier = Notifier("first", command=script("raise SystemExit(3)"))
    notifier.send([alert()])
    notifier.close()
    assert "ended with status 3" in warnings_of(caplog)[0]


def test_both_are_told_and_one_that_fails_does_not_keep_the_other_from_it(server, script, tmp_path):
    server.behaviour = "fail"
    command = script("import sys; open(sys.argv[1], 'w').write(sys.stdin.read())")
    notifier = Notifier("first", url=server.url, command=[*command, str(tmp_path / "got")])
    notifier.send([alert()])
    notifier.close()
    assert json.loads((tmp_path / "got").read_text())["rule"] == "loops"
    assert len(server.bodies) == 1


def test_a_full_queue_drops_alerts_instead_of_waiting(server, caplog):
    server.behaviour = "hang"
    notifier = Notifier("first", url=server.url, timeout_s=1.0)
    begin = time.monotonic()
    notifier.send([alert(step) for step in range(3 * QUEUE_SIZE)])
    assert time.monotonic() - begin < 0.5
    assert notifier.num_dropped >= QUEUE_SIZE
    assert caplog.text.count("further ones are dropped") == 1
    notifier.close()


def test_nothing_to_tell_starts_no_thread(server):
    before = threading.active_count()
    notifier = Notifier("first", url=server.url)
    notifier.send([])
    notifier.send([alert(severity="info")])
    assert threading.active_count() == before
    notifier.close()


# ------------------------------------------------------------------------------------ configuration


def test_a_url_in_the_configuration_is_not_written_to_the_run_folder_nor_to_trackers():
    config = StableOPDConfig(health={"notify": {"url": f"https://example.org/{SECRET}"}})
    assert SECRET not in dump_config(config)
    assert SECRET not in str(flatten(config.model_dump(mode="json")))
    assert SECRET not in repr(config)


@pytest.mark.parametrize(
    ("notify", "words"),
    [
        ({}, "tells nobody"),
        ({"min_severity": "critical"}, "tells nobody"),
        ({"url": f"ftp://example.org/{SECRET}"}, "does not begin with http"),
        ({"url": f"http:///{SECRET}"}, "does not hold a URL"),
        ({"url": "**********"}, "does not begin with http"),
        ({"url": f"https://me:{SECRET}@example.org"}, "user name"),
        ({"url": f"https://example.org/{SECRET}", "url_env": "HOOK"}, "the same setting"),
        ({"url": f"https://example.org/{SECRET}", "timeout_s": 0}, "timeout_s"),
        ({"url": f"https://example.org/{SECRET}", "nothing": 1}, "health.notify.nothing"),
        ({"url": [f"https://example.org/{SECRET}"]}, "health.notify.url"),
        ({"url_env": "not a name"}, "url_env"),
        ({"command": "mail me"}, "command"),
        ({"command": ["true"], "min_severity": "loud"}, "min_severity"),
    ],
)
def test_an_impossible_setting_is_refused_without_showing_a_url(notify, words):
    with pytest.raises(ConfigError, match=words) as caught:
        StableOPDConfig(health={"notify": notify})
    assert SECRET not in str(caught.value)


def test_a_complaint_about_health_does_not_show_the_url_either():
    with pytest.raises(ConfigError, match="loop_warning") as caught:
        StableOPDConfig(health={"notify": {"url": f"https://x.y/{SECRET}"}, "thresholds": {"loop_warnin": 0.1}})
    assert SECRET not in str(caught.value)


def test_who_is_told_may_change_on_resume(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(StableOPDConfig()))
    check_resumable(path, StableOPDConfig(health={"notify": {"command": ["true"]}}))
    path.write_text(dump_config(StableOPDConfig(health={"notify": {"url": "https://example.org/x"}})))
    check_resumable(path, StableOPDConfig())


@pytest.mark.parametrize("url", ["http://localhost:8000/x", "https://hooks.example.org/services/T/B/x?y=z"])
def test_ordinary_urls_are_fine(url):
    assert url_problem(url) is None


def test_a_url_given_on_the_command_line_is_not_written_to_the_run_folder(monkeypatch):
    from stableopd.recorder import describe_environment

    monkeypatch.setattr(sys, "argv", ["stableopd", "train", "x.yaml", f"health.notify.url=https://x.y/{SECRET}"])
    command = describe_environment()["command"]
    assert command == ["stableopd", "train", "x.yaml", "health.notify.url=**********"]
