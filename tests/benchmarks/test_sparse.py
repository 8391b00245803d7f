"""The benchmark of sparse features as a person runs it, on very little."""

import pytest

from tests.benchmarks.command import result_of, run_benchmark


@pytest.mark.slow
def test_every_way_to_train_takes_its_turns() -> None:
    done = run_benchmark("sparse.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert set(result_of(done.stdout)) == {"fsrl_step_ratio", "fsrl_topk_step_ratio", "sae_encode_seconds"}
    for name in ("dpo", "lora", "vector", "fsrl, TopK", "fsrl, JumpReLU"):
        assert f"  {name} " in done.stdout
    trained = [line.split()[-3].replace(",", "") for line in done.stdout.splitlines() if "numbers trained" in line]
    assert int(trained[2]) == 256, "one vector"
    assert int(trained[3]) == int(trained[4]) == 2048 * (256 + 2)
