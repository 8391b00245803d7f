"""The share of the machine's rate: its operation count by hand, and the script as a person runs it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.limit import kind_of, useful_flops
from tests.benchmarks.command import in_miniature, result_of, run_benchmark
from tests.tiny_models import LAYERS, VOCAB, WIDTH, make_model
from tiltmeter.pairs.batch import TokenizedPair

PAIR = TokenizedPair([3] * 3, [4] * 2, [5] * 1)


def test_useful_operations_by_hand() -> None:
    model = make_model("llama")
    key_value = WIDTH // 2  # two of four heads
    block = 2 * WIDTH * WIDTH + 2 * WIDTH * key_value + 3 * WIDTH * 2 * WIDTH
    looks = (1 + 2 + 3) + (4 + 5) + 4  # prompt, chosen, rejected: each token and what it may look at
    forward = 2 * LAYERS * block * 6 + 4 * WIDTH * LAYERS * looks
    head = 2 * VOCAB * WIDTH * 3
    assert useful_flops(model, [PAIR], frozen_embeddings=False) == 3 * (forward + head)
    assert useful_flops(model, [PAIR], frozen_embeddings=True) == 3 * forward + 2 * head


def test_useful_weights_are_those_that_a_forward_pass_multiplies() -> None:
    model = make_model("llama")
    ids = torch.randint(3, VOCAB, (1, 6))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for operator, n in counted.items() if "mm" in str(operator))
    no_looks = useful_flops(model, [PAIR], frozen_embeddings=False) - 3 * 4 * WIDTH * LAYERS * 19
    assert no_looks / 3 == products - 2 * VOCAB * WIDTH * 3  # the model's own head ran on the prompt as well


def test_operators_are_told_apart() -> None:
    assert kind_of("aten::addmm") == "matrix products"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert kind_of("aten::copy_") == "copies, gathers, fills"
    assert kind_of("aten::mul") == "element-wise operations and reductions"


@pytest.mark.slow
def test_quick_limit_ends_with_its_figure() -> None:
    little = ("--pairs-per-step", "2", "--steps", "2", "--threads", "1")
    done = run_benchmark("limit.py", "--quick", *little, before=in_miniature)
    assert done.returncode == 0, done.stderr
    result = result_of(done.stdout)
    assert list(result) == ["matmul_share", "share_of_torch_mm"]
    assert 0 < result["matmul_share"] <= result["share_of_torch_mm"]
    for phase in ("collate", "mask", "forward: blocks", "forward: attention", "backward: head", "optimizer"):
        assert phase in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_one_line() -> None:
    done = run_benchmark("limit.py", "--device", "cuda")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "benchmark: --device cuda: no CUDA device is visible to torch here; use --device cpu"
    ]
