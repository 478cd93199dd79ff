"""SIGKILL to a prefiller, decoder or proxy of plain `vllm serve`, at a seeded moment with four requests in flight.

For test_pd.py: PD_KILLS=10 kills ten times, each of the three before any of them again, and then a prefiller falls
silent; otherwise a decoder dies once. Last of all a prefiller dies, and stays dead.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Any

from launch.demo_model import recall
from tests.engines import apart, engines
from tests.engines.apart import Pair

TOKENS = 512
ANSWER_S = 30.0  # in which each request ends, whatever dies: an answer, or an error that OpenAI's clients know
KILLS = int(os.environ.get("PD_KILLS", "0"))
BACK_S = 70.0  # word of a hand-over that nobody came for is kept for 60 s


def questions(seed: int, count: int) -> list[Any]:
    """About a context that no other seed has."""
    rng = random.Random(seed)
    return list(recall.queries(recall.make_context(rng, TOKENS), rng, count))


def cached(answer: dict[str, Any]) -> int:
    """Tokens that its last engine did not compute."""
    details = answer["usage"]["prompt_tokens_details"]
    return int(details["cached_tokens"] or 0) if details else 0


class Storm:
    """Four requests at a time, each with a prompt of its own; every end is noted, and every answer checked."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self._pair, self._stop = pair, threading.Event()
        self.ends: list[tuple[float, int, Any]] = []  # seconds, status, answer
        self.asked: list[Any] = []
        self.texts: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(seed + 1000 * i,)) for i in range(4)]
        for thread in self._threads:
            thread.start()

    def _run(self, seed: int) -> None:
        while not self._stop.is_set():
            seed += 1
            begun, query = time.monotonic(), questions(seed, 1)[0]
            body = {"model": str(engines.MODEL), "prompt": query.token_ids, "max_tokens": 3, "temperature": 0}
            try:
                status, answer = apart.ask(f"{self._pair.proxy.url}/v1/completions", body, ANSWER_S + 10)
            except OSError:  # the proxy itself is dead
                status, answer = 503, {"error": {"message": "no proxy"}}
            self.ends.append((time.monotonic() - begun, status, answer))
            if status == 200:
                self.asked.append(query)
                self.texts.append(answer["choices"][0]["text"])
            else:
                time.sleep(0.2)

    def end(self) -> None:
        """Wait for what is in flight: each has an answer or an error in time, and answers are right."""
        self._stop.set()
        for thread in self._threads:
            thread.join(ANSWER_S + 20)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"
        proper(self.ends)
        if self.asked:
            assert recall.score(self.asked, [recall.encode(text) for text in self.texts]).exact >= 0.95


def handed_over(pair: Pair, seed: int) -> None:
    """KV is handed over again, once breakers and probes have had their time."""
    deadline = time.monotonic() + 60
    while True:
        seed += 1
        query = questions(seed, 1)[0]
        body = {"model": str(engines.MODEL), "prompt": query.token_ids, "max_tokens": 3, "temperature": 0}
        status, answer = apart.ask(f"{pair.proxy.url}/v1/completions", body)
        if status == 200 and cached(answer) == len(query.token_ids) - 1:
            assert answer["choices"][0]["text"] == query.expected
            return
        assert time.monotonic() < deadline, (status, answer)
        time.sleep(0.5)


def given_back(pair: Pair, seed: int) -> None:
    """Nothing is held at either side. Engines notice with their next step, so each is asked for something else."""
    names = ("lmcache:pd_open_handovers", "lmcache:pinned_memory_objs_count")
    handed_over(pair, seed)
    deadline = time.monotonic() + BACK_S
    while True:
        time.sleep(0.5)
        for served in (pair.prefiller, pair.decoder):
            served.complete([1, 2, 3], 5)
        held = {(s.name, name): s.metric(name) for s in (pair.prefiller, pair.decoder) for name in names}
        if not any(held.values()):
            return
        assert time.monotonic() < deadline, held


def kill_and_revive(pair: Pair) -> None:
    """One after the other; each comes back before the next dies."""
    dice = random.Random(21)
    rounds = [dice.sample(["prefiller", "decoder", "proxy"], 3) for _ in range(-(-KILLS // 3))]
    victims = [name for names in rounds for name in names][:KILLS] or ["decoder"]
    for i, victim in enumerate(victims):
        storm = Storm(pair, 100_000 * (i + 1))
        time.sleep(dice.uniform(0.5, 3.0))
        getattr(pair, victim).kill()
        time.sleep(dice.uniform(1.0, 4.0))  # the others go on
        pair.start(victim)
        getattr(pair, victim).wait()
        storm.end()
        given_back(pair, 50_000 + 1000 * i)


def silence(pair: Pair) -> None:
    """The prefiller stands still for a while."""
    storm = Storm(pair, 90_000_000)
    time.sleep(1.7)
    os.killpg(pair.prefiller.process.pid, signal.SIGSTOP)
    time.sleep(15.0)
    os.killpg(pair.prefiller.process.pid, signal.SIGCONT)
    time.sleep(2.0)
    storm.end()
    given_back(pair, 95_000_000)


def kill_the_prefiller_for_good(pair: Pair) -> None:
    """The decoder computes what the prefiller does not: nobody sees an error."""
    storm = Storm(pair, 97_000_000)
    time.sleep(1.3)
    pair.prefiller.kill()
    time.sleep(6.0)
    storm.end()
    assert len(storm.texts) == len(storm.ends) > 4
    assert pair.decoder.process.poll() is None


def proper(ends: list[tuple[float, int, Any]]) -> None:
    """Each has an answer or an OpenAI error, in bounded time."""
    assert ends
    for seconds, status, answer in ends:
        assert seconds < ANSWER_S
        assert status == 200 or (500 <= status < 600 and answer["error"]["message"]), (status, answer)
