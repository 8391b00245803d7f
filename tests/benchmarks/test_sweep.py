"""The sweep benchmark as a person runs it, on very little, without the real data or a network."""

import pytest

from tests.benchmarks.command import result_of, run_benchmark


@pytest.mark.slow
def test_quick_sweep_says_what_the_peer_says() -> None:
    little = ("--prompts", "3", "--strengths", "3", "--new-tokens", "5", "--threads", "1", "--peer", "hook")
    done = run_benchmark("sweep.py", "--quick", *little)
    assert done.returncode == 0, done.stderr
    result = result_of(done.stdout)
    names = (
        "speedup_generation",
        "speedup_post_norm",
        "layer_cost_ratio",
        "tokens_identical",
        "random_vectors_cost_ratio",
    )
    assert tuple(result) == names
    assert result["tokens_identical"] == 1
    assert min(result.values()) > 0
    assert "Completions: 9 of 9 token for token the peer's" in done.stdout
