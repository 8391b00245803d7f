"""Steering vectors as files of other tools: steering-vectors, llama.cpp's control vectors, lm-evaluation-harness.

``python -m tiltmeter.steering.export RUN/vectors/FILE OUT format=gguf`` writes those of one kind and position (docs/vectors.md).
"""

import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import gguf
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tiltmeter.errors import UserError
from tiltmeter.files import write_atomically
from tiltmeter.models.causal_lm import CausalLM
from tiltmeter.models.layers import decoder_blocks, is_site, site_depth
from tiltmeter.steering.vector import SteeringVector, load_vectors

Format = Literal["steering_vectors", "gguf", "lm_eval"]
_ARCHITECTURE = "controlvector"


def vectors_by_block(vectors: Iterable[SteeringVector]) -> dict[int, SteeringVector]:
    """Vectors by the decoder block, counted from 0, behind which they are added; those at the final sites have none.

    Raises:
        UserError: two at one block (several kinds, positions or draws), or none at any.
    """
    found: dict[int, SteeringVector] = {}
    for vector in vectors:
        if not vector.site.startswith("layer_") or not is_site(vector.site):
            continue
        block = site_depth(vector.site, sys.maxsize)
        if block in found:
            one, other = (f"{v.id.kind} at {v.id.position}" for v in (found[block], vector))
            raise UserError(f"vectors: {vector.site} has two, {one} and {other}; choose by kind, position and draw")
        found[block] = vector
    if not found:
        raise UserError("vectors: none at a layer; other tools know none at the final norm")
    return dict(sorted(found.items()))


def write_steering_vectors(path: Path, vectors: Iterable[SteeringVector]) -> None:
    """Write ``layer_<block>`` → [d_model] as safetensors, from which six lines make a ``SteeringVector`` (docs/vectors.md).

    Raises:
        UserError, FailedWrite: as :func:`vectors_by_block`; the disk is full.
    """
    tensors = {f"layer_{block}": v.values.contiguous() for block, v in vectors_by_block(vectors).items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"layer_type": "decoder_block"}))


def write_control_vector(path: Path, vectors: Iterable[SteeringVector], *, model_type: str) -> list[int]:
    """Write a GGUF control vector as repeng does, for llama.cpp's ``--control-vector``: ``direction.<block>`` in float32.

    llama.cpp adds each behind its block, at all tokens, but none behind block 0, which is left out.

    Args:
        model_type: of the model, for example ``llama``; llama.cpp takes it as a hint.

    Returns:
        The blocks that were written.

    Raises:
        UserError, FailedWrite: as :func:`vectors_by_block`, or there is one at block 0 alone; the disk is full.
    """
    kept = {block: v for block, v in vectors_by_block(vectors).items() if block > 0}
    if not kept:
        raise UserError("vectors: one behind block 0 alone, where llama.cpp adds none; take another site")

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(kept))
        for block, vector in kept.items():
            writer.add_tensor(f"direction.{block}", vector.values.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(path, write)
    return list(kept)


def write_lm_eval(folder: Path, vectors: Iterable[SteeringVector], model: PreTrainedModel) -> list[Path]:
    """Write files for lm-evaluation-harness's ``steered`` model, one a block: of several in a file it adds the last at each.

    Args:
        model: names the modules; its weights aren't looked at.

    Raises:
        UserError, FailedWrite: as :func:`vectors_by_block`; the disk is full.
    """
    names = {module: name for name, module in model.base_model.named_modules()}
    blocks, written = decoder_blocks(model), []
    for block, vector in vectors_by_block(vectors).items():
        vector.check_fits(model)
        entry = {"action": "add", "steering_coefficient": 1.0, "steering_vector": vector.values, "bias": None}
        written.append(folder / f"layer_{block:02d}.pt")
        write_atomically(written[-1], partial(torch.save, {names[blocks[block]]: entry}))
    return written


def export(source: Path, out: Path, form: str, wanted: Mapping[str, str], model: str | None) -> list[str]:
    """Export the vectors of a file; returns lines that say what was written and what was left out.

    Args:
        wanted: ``kind``, ``position``, ``draw``, ``source`` or ``site`` that vectors are to have, as text.
        model: folder or hub id of the model that they belong to; None: ``base/`` of the run whose file it is. Only its
            configuration is read.

    Raises:
        UserError: no such format, file, model or vectors.
    """
    if form not in get_args(Format):
        raise UserError(f"format: expected {', '.join(get_args(Format))}, got {form}")
    chosen = _chosen(source, wanted)
    at = list(vectors_by_block(chosen))
    left = [v.site for v in chosen if not v.site.startswith("layer_")]
    if form == "steering_vectors":
        write_steering_vectors(out, chosen)
    else:
        lm = CausalLM(model or str(source.parent.parent / "base"))
        if form == "gguf":
            at = write_control_vector(out, chosen, model_type=lm.load_config().model_type)
        else:
            write_lm_eval(out, chosen, lm.build_on_meta(lm.load_tokenizer()))
    lines = [f"Wrote {len(at)} vectors, behind blocks {', '.join(map(str, at))}: {out}"]
    return lines + [f"Left out, as {form} knows no such place: {', '.join(left)}"] * bool(left)


def _chosen(source: Path, wanted: Mapping[str, str]) -> list[SteeringVector]:
    held = list(load_vectors(source).values())
    chosen = [v for v in held if all(str(getattr(v.id, name)) == value for name, value in wanted.items())]
    if not chosen:
        there = sorted({f"kind={v.id.kind} position={v.id.position}" for v in held})
        raise UserError(f"{source}: no vector with {dict(wanted)}; it has {'; '.join(there)}")
    return chosen


def main(arguments: list[str]) -> int:
    """Run ``FILE OUT format=F [model=M] [kind=v*] [position=prompt_last] [draw=0] [source=]``; wrong input gives one line and 2."""
    places = [text for text in arguments if "=" not in text]
    options = dict(text.split("=", 1) for text in arguments if "=" in text)
    form, model = options.pop("format", "steering_vectors"), options.pop("model", None)
    try:
        if len(places) != 2 or set(options) - {"kind", "position", "draw", "source", "site"}:
            raise UserError(
                f"expected FILE OUT format={'|'.join(get_args(Format))} [model=] [kind=] [position=] [draw=] [source=]"
            )
        for line in export(Path(places[0]), Path(places[1]), form, options, model):
            print(line)  # noqa: T201
    except UserError as error:
        print(f"tiltmeter: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
