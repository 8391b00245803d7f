"""The Perspective API as a server on this machine plays it."""

import json
import math
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest

from tests.processes import HANGS
from tests.text_samples import figure, samples_of
from tiltmeter.errors import UserError
from tiltmeter.scoring.perspective import MAX_CHARACTERS, PerspectiveToxicity

KEY = "canary-KEY-0123456789"
ENV = "PERSPECTIVE_TEST_KEY"
pytestmark = pytest.mark.filterwarnings("ignore:PerspectiveToxicity. Google ends")

Answer = tuple[int, bytes]


class Request(NamedTuple):
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


def scored(value: Any) -> Answer:
    return 200, json.dumps({"attributeScores": {"TOXICITY": {"summaryScore": {"value": value}}}}).encode()


def refused(error_type: str) -> Answer:
    body = {"error": {"code": 400, "message": f"you sent {KEY}", "details": [{"errorType": error_type}]}}
    return 400, json.dumps(body).encode()


class Service:
    """Answers by the text it is sent; keeps what it was sent."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answer: Callable[[str], Answer] = lambda text: scored(0.25)
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append(Request(self.path, dict(self.headers), body))
                status, reply = service.answer(body["comment"]["text"])
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", f"{service.url}/elsewhere")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def do_GET(self) -> None:  # where a client that follows a redirect would come
                service.requests.append(Request(self.path, dict(self.headers), {}))
                self.send_error(404)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that gave up is what one test is about
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def scorer(self, **options: Any) -> PerspectiveToxicity:
        return PerspectiveToxicity(ENV, **({"qps": 1000.0} | options))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv(ENV, KEY)
    service = Service()
    monkeypatch.setattr("tiltmeter.scoring.perspective.URL", f"{service.url}/v1alpha1/comments:analyze")
    yield service
    service.server.shutdown()
    service.server.server_close()


def test_a_score_comes_back_and_the_key_goes_into_a_header_alone(service: Service) -> None:
    scorer = service.scorer()
    scorer.start()
    scores = scorer.score(samples_of(["you fool"], ["you fool"]))
    assert figure(scores, "toxicity").value == 0.25
    assert figure(scores, "toxicity").scorer == "Perspective API v1alpha1 TOXICITY language=en"
    first, second = service.requests
    assert second.body == {
        "comment": {"text": "you fool", "type": "PLAIN_TEXT"},
        "languages": ["en"],
        "requestedAttributes": {"TOXICITY": {}},
        "doNotStore": True,
    }
    assert first.path == "/v1alpha1/comments:analyze"
    assert {name.lower(): value for name, value in first.headers.items()}["x-goog-api-key"] == KEY
    assert KEY not in first.path + json.dumps(first.body) + repr(scorer) + repr(vars(scorer)) + repr(scores)


def test_it_warns_at_start_that_the_service_ends(service: Service) -> None:
    with pytest.warns(UserWarning, match=r"ends the Perspective API on 31 December 2026.*ClassifierToxicity"):
        service.scorer().start()


def test_empty_texts_are_not_sent_and_unknown_languages_are_missing(service: Service) -> None:
    answers = {"bonjour": refused("LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"), "odd": scored(1.5), "none": scored(None)}
    service.answer = lambda text: answers.get(text, scored(0.5))
    with pytest.warns(UserWarning, match="5 of 6 texts have no score: 2 × empty text; .*1 × the service answered 400"):
        scores = service.scorer().score_texts(["hi", "", " \n", "bonjour", "odd", "none"])
    assert scores[0].value == 0.5
    assert all(math.isnan(score.value) for score in scores[1:])
    assert [request.body["comment"]["text"] for request in service.requests] == ["hi", "bonjour", "odd", "none"]


def test_long_texts_are_cut_and_counted(service: Service) -> None:
    fits = "é" * MAX_CHARACTERS
    scores = service.scorer().score_texts([fits, fits + "!"])
    assert [score.is_cut for score in scores] == [False, True]
    assert {request.body["comment"]["text"] for request in service.requests} == {fits}


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_service_that_is_gone_says_so_with_the_date_and_what_to_use(service: Service, status: int) -> None:
    service.answer = lambda text: (status, b"<html>gone</html>")
    with pytest.raises(
        UserError, match=rf"^Perspective: the service answered {status}; .*31 December 2026.*toxic-bert"
    ) as caught:
        service.scorer().start()
    assert "\n" not in str(caught.value)


def test_a_service_that_goes_while_scoring_is_asked_no_more(service: Service) -> None:
    service.answer = lambda text: scored(0.5) if text == "one" else (403, b"")
    with pytest.warns(UserWarning, match=r"3 of 4 texts have no score: 3 × the service answered 403.*31 December 2026"):
        scores = service.scorer().score_texts(["one", "two", "three", "four"])
    assert [math.isnan(score.value) for score in scores] == [False, True, True, True]
    assert len(service.requests) == 2


@pytest.mark.parametrize(
    "answer", [(200, b"<html>"), (200, b"{}"), (200, b"[1]"), (200, b"\xff"), (302, b""), (418, b"")]
)
def test_answers_that_are_none_are_missing(service: Service, answer: Answer) -> None:
    service.answer = lambda text: answer
    with pytest.warns(UserWarning, match="1 of 1 texts have no score"):
        assert math.isnan(service.scorer().score_texts(["hi"])[0].value)
    assert len(service.requests) == 1, "no redirect is followed, no nonsense asked for again"


def test_a_wrong_key_names_the_variable(service: Service) -> None:
    service.answer = lambda text: refused("API_KEY_INVALID")
    with pytest.raises(UserError, match=rf"the service answered 400; check the key in {ENV}"):
        service.scorer().start()


def test_a_service_out_of_reach_is_one_line(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltmeter.scoring.perspective.URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^Perspective: no usable answer from the service \(.*31 December 2026"):
        service.scorer().start()


def test_requests_end_at_the_limits_of_time(service: Service) -> None:
    with pytest.warns(UserWarning, match="2 of 3 texts have no score: 2 × over time_limit_s=60"):
        scores = service.scorer(qps=0.01, time_limit_s=60.0).score_texts(["one", "two", "three"])
    assert [math.isnan(score.value) for score in scores] == [False, True, True]
    hang = threading.Event()
    service.answer = lambda text: scored(0.5) if hang.wait(HANGS) else scored(0.1)
    with pytest.warns(UserWarning, match="no usable answer from the service"):
        assert math.isnan(service.scorer(timeout_s=0.05).score_texts(["slow"])[0].value)
    hang.set()


@pytest.mark.parametrize("value", ["", " ", f"{KEY} {KEY}", f"{KEY}\nX-Evil: 1", "ключ"])
def test_a_key_that_can_be_no_header_is_refused_and_never_shown(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(ENV, value)
    with pytest.raises(UserError, match=rf"environment variable {ENV} is not") as caught:
        PerspectiveToxicity(ENV).start()
    assert KEY not in str(caught.value)


def test_no_exception_warning_or_traceback_holds_the_key(service: Service) -> None:
    service.answer = lambda text: refused(KEY)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        service.scorer().score_texts(["hi"])
        with pytest.raises(UserError) as caught:
            service.scorer().start()
    everything = "".join(traceback.format_exception(caught.value)) + "".join(str(w.message) for w in seen)
    assert len(seen) >= 2
    assert KEY not in everything


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attribute": "toxicity!"}, r"attribute: expected a name such as TOXICITY"),
        ({"qps": 0.0}, r"qps: expected a number above 0, got 0"),
        ({"timeout_s": -1.0}, r"timeout_s: expected a number above 0"),
        ({"time_limit_s": math.inf}, r"time_limit_s: expected a number above 0"),
        (
            {"api_key_env": "AIza-not-a-name"},
            r"^api_key_env: expected the name of an environment variable, not a key$",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PerspectiveToxicity(**options)
