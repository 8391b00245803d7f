import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.tiny_models import ARCHITECTURES, LAYERS, make_model
from tiltmeter.errors import UserError
from tiltmeter.models.layers import all_sites, backbone, final_norm, layer_site, resolve_sites, site_depth, unembedding


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_final_norm_makes_what_the_unembedding_reads(family: str) -> None:
    model = make_model(family, attn="eager")
    seen: list[torch.Tensor] = []
    handle = final_norm(model).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        last = backbone(model)(input_ids=torch.arange(3, 9)[None]).last_hidden_state
    handle.remove()
    assert len(seen) == 1
    assert_close(seen[0], last, rtol=0, atol=0)
    assert last.shape[-1] == unembedding(model).weight.shape[1]


def test_a_model_without_a_final_norm_is_refused() -> None:
    model = make_model("llama")
    del model.model.norm
    model.model.last = nn.Identity()
    with pytest.raises(UserError, match=r"expected a final norm named one of norm, ln_f, .* in LlamaForCausalLM"):
        final_norm(model)


def test_all_sites_name_every_depth_once_in_order() -> None:
    assert all_sites(1) == ("final_pre_norm", "final_post_norm")
    for n_layers in (1, LAYERS, 120):
        assert [site_depth(site, n_layers) for site in all_sites(n_layers)] == list(range(n_layers + 1))
        assert site_depth(layer_site(n_layers - 1), n_layers) == site_depth("final_pre_norm", n_layers)
        assert resolve_sites("all", n_layers) == all_sites(n_layers)


@pytest.mark.parametrize("site", ["layer_7", "layer_007", "layer_-1", "Layer_01", "final", "", "layer_01 ", "layer_٠١"])
def test_an_unknown_site_is_refused_and_the_known_ones_are_named(site: str) -> None:
    with pytest.raises(UserError, match="expected final_pre_norm, final_post_norm or a layer such as layer_07, got"):
        site_depth(site, 8)


def test_a_layer_behind_the_last_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"sites: layer_08: this model has 8 blocks, the last one is layer_07"):
        resolve_sites(["layer_00", "layer_08"], 8)


@pytest.mark.parametrize("sites", [3, [3], ["layer_01", 3]])
def test_a_number_is_refused_and_the_site_that_may_be_meant_is_named(sites: int | list[str | int]) -> None:
    with pytest.raises(UserError, match=r"or a layer such as layer_07, got 3; block 3, counted from 0, is layer_03"):
        resolve_sites(sites, 8)


@pytest.mark.parametrize("sites", [[], ["layer_01", "layer_01"]])
def test_no_site_or_one_twice_is_refused(sites: list[str]) -> None:
    with pytest.raises(UserError, match="at least one site, each once"):
        resolve_sites(sites, 4)
