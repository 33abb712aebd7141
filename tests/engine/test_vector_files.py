"""Steering vectors as files: round trips, what other tools read and write, and broken files."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shardlens.engine import Origin, SteeringVectors, vector_files
from shardlens.model import DEMO, POINTS, ModelConfig, Tap

D, N_LAYERS = 37, 6
CONFIG = dataclasses.replace(ModelConfig.from_hf(DEMO / "config.json"), d=D, n_layers=N_LAYERS)
ORIGIN = Origin("0123456789abcdef", "pca", "last", 2, ("a" * 16, "b" * 16))
EVERY_TAP = [Tap(layer, point) for layer in range(N_LAYERS) for point in POINTS[1:]]
BLOCKS = [Tap(layer, "resid_post") for layer in (1, 3, 5)]


def made(taps: list[Tap], origin: Origin = ORIGIN) -> SteeringVectors:
    generator = torch.Generator().manual_seed(0)
    return SteeringVectors(
        {tap: torch.randn(D, generator=generator) for tap in taps},
        {tap: 1 / (3 + tap.layer) for tap in taps[1:]},  # no short decimals
        N_LAYERS,
        origin,
    )


def assert_same(ours: SteeringVectors, other: SteeringVectors) -> None:
    assert (ours.taps, ours.n_layers, ours.origin) == (other.taps, other.n_layers, other.origin)
    assert ours.resid_norms == other.resid_norms
    assert all(torch.equal(ours.at(tap), other.at(tap)) for tap in ours.taps)


def write_gguf(
    path: Path, tensors: dict[str, Any], arch: str = "controlvector", **texts: str
) -> None:
    """A file as any tool might write it."""
    writer = gguf.GGUFWriter(path, arch)
    for name, text in texts.items():
        writer.add_string(name.replace("__", "."), text)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.asarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def repeng() -> Iterator[Any]:
    """repeng 0.4, which wants numpy 1 and so is no part of the extra "dev"."""
    with pytest.MonkeyPatch.context() as patch:
        # It names this type while it is imported; numpy 2 has another word for it.
        patch.setattr(np, "float_", np.float64, raising=False)
        yield pytest.importorskip("repeng", reason="needs repeng, which wants another numpy")


@pytest.mark.parametrize(
    ("name", "taps"), [("v.safetensors", EVERY_TAP), ("v.safetensors", BLOCKS), ("v.gguf", BLOCKS)]
)
@pytest.mark.parametrize("origin", [ORIGIN, Origin()])
def test_a_round_trip_changes_nothing(
    tmp_path: Path, name: str, taps: list[Tap], origin: Origin
) -> None:
    vectors = made(taps, origin)
    vectors.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert_same(SteeringVectors.load(tmp_path / name), vectors)
    assert_same(SteeringVectors.load(str(tmp_path / name), CONFIG), vectors)
    with pytest.raises(ValueError, match=rf"{name}: the steering vectors have 37 numbers"):
        SteeringVectors.load(tmp_path / name, dataclasses.replace(CONFIG, d=38))
    with pytest.raises(ValueError, match=rf"{name}: .* model of 6 layers, this one has 7"):
        SteeringVectors.load(tmp_path / name, dataclasses.replace(CONFIG, n_layers=7))


def test_gguf_names_a_tap_by_the_block_before_it(tmp_path: Path) -> None:
    vectors = made([Tap(2, "resid_pre"), Tap(4, "resid_pre")])
    vectors.save(tmp_path / "v.gguf")
    loaded = SteeringVectors.load(tmp_path / "v.gguf")
    assert loaded.taps == (Tap(1, "resid_post"), Tap(3, "resid_post"))
    for tap in vectors.taps:
        assert torch.equal(loaded.at(tap), vectors.at(tap))
    assert loaded.resid_norm(Tap(4, "resid_pre")) == vectors.resid_norm(Tap(4, "resid_pre"))


def test_a_gguf_file_is_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    vectors = made(BLOCKS, Origin())
    vectors.save(tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "shardlens."))
    }
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "unknown",
        "controlvector.layer_count": 3,
    }
    assert [tensor.name for tensor in reader.tensors] == [
        "direction.1",
        "direction.3",
        "direction.5",
    ]
    for tensor, tap in zip(reader.tensors, BLOCKS, strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [D]
        assert np.array_equal(tensor.data, vectors.at(tap).numpy())


def test_repeng_reads_ours_at_the_same_blocks(tmp_path: Path, repeng: Any) -> None:
    vectors = made(BLOCKS)
    vectors.save(tmp_path / "v.gguf")
    control = repeng.ControlVector.import_gguf(tmp_path / "v.gguf")
    assert control.model_type == ORIGIN.model
    assert sorted(control.directions) == [1, 3, 5]
    for layer, direction in control.directions.items():
        assert np.array_equal(direction, vectors.at(Tap(layer, "resid_post")).numpy())


def test_we_read_repengs_at_the_same_blocks(tmp_path: Path, repeng: Any) -> None:
    generator = np.random.default_rng(0)
    directions = {layer: generator.normal(size=D).astype(np.float32) for layer in (4, 2, 0)}
    repeng.ControlVector("llama", directions).export_gguf(tmp_path / "v.gguf")
    vectors = SteeringVectors.load(tmp_path / "v.gguf", CONFIG)
    assert vectors.taps == tuple(Tap(layer, "resid_post") for layer in (0, 2, 4))
    for layer, direction in directions.items():
        assert np.array_equal(direction, vectors.at(Tap(layer, "resid_post")).numpy())
    assert (vectors.n_layers, vectors.resid_norms) == (N_LAYERS, {})
    assert vectors.origin == Origin(method="gguf")
    assert vectors.warning("f" * 16) is None


def test_repengs_layers_are_our_blocks(repeng: Any) -> None:
    """Its direction K is made from the output of block K, counted from 0."""
    from oracles import hf_model
    from repeng.extract import batched_get_hiddens

    torch.manual_seed(0)
    model = hf_model("llama-mha")
    outputs: dict[int, torch.Tensor] = {}

    def kept(layer: int) -> Any:
        return lambda *call: outputs.update({layer: call[2]})

    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(kept(layer))

    class Encoded(dict[str, torch.Tensor]):
        def to(self, _: Any) -> Encoded:
            return self

    token_ids = torch.randint(3, 500, (1, 9))
    encoded = Encoded(input_ids=token_ids, attention_mask=torch.ones_like(token_ids))
    layers = list(range(len(model.model.layers) - 1))  # after the last block comes the norm
    hiddens = batched_get_hiddens(model, lambda *_, **__: encoded, ["text"], layers, 1)
    assert len(layers) >= 2
    for layer in layers:
        assert np.array_equal(hiddens[layer][0], outputs[layer][0, -1].detach().numpy())


def test_another_tools_gguf_says_little(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    write_gguf(path, {"direction.3": np.ones(D, np.float32)})
    assert SteeringVectors.load(path).n_layers == 4  # as few as there can be
    assert SteeringVectors.load(path, CONFIG).n_layers == N_LAYERS
    write_gguf(path, {"direction.6": np.ones(D, np.float32)})
    with pytest.raises(ValueError, match="layer 6 does not exist"):
        SteeringVectors.load(path, CONFIG)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (Tap(0, "resid_post"), "no room for the output of layer 0, which is resid_post of layer 0"),
        (Tap(1, "resid_pre"), "no room for the output of layer 0, which is resid_pre of layer 1"),
        (Tap(0, "resid_pre"), "no room for the embedding"),
        (Tap(2, "mlp_norm"), "not mlp_norm of layer 2: save as .safetensors"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(tmp_path: Path, tap: Tap, message: str) -> None:
    vectors = made([tap, Tap(3, "resid_post")])
    with pytest.raises(ValueError, match=message):
        vectors.save(tmp_path / "v.gguf")
    with pytest.raises(ValueError, match=message):
        vector_files.check_format(tmp_path / "v.gguf", vectors.taps)
    assert not list(tmp_path.iterdir())
    vectors.restricted([Tap(3, "resid_post")]).save(tmp_path / "v.gguf")


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"v.pt: .* kept as .safetensors or .gguf"):
        made(BLOCKS).save(tmp_path / "v.pt")
    with pytest.raises(ValueError, match=r"v.pt: .* kept as .safetensors or .gguf"):
        SteeringVectors.load(tmp_path / "v.pt")


@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    path, plain = tmp_path / f"v.{ending}", tmp_path / "plain"
    made(BLOCKS).save(path)
    before = path.read_bytes()
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # others may read it as any file
    plain.unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    monkeypatch.setattr(vector_files, "save", full)
    with pytest.raises(OSError, match=rf"v.{ending} cannot be written: No space left"):
        made(BLOCKS[:2]).save(path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before
    with pytest.raises(ValueError, match="cannot be written"):
        made(BLOCKS).save(tmp_path / "nowhere" / f"v.{ending}")


@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
def test_a_fifo_is_given_the_whole_file(tmp_path: Path, ending: str) -> None:
    """Writers need a file that they can seek in, which a fifo is not."""
    path, fifo, found = tmp_path / f"v.{ending}", tmp_path / f"fifo.{ending}", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()))
    reader.start()
    made(BLOCKS).save(fifo)
    reader.join(20)
    path.write_bytes(found[0])
    loaded = SteeringVectors.load(path).vectors
    assert fifo.is_fifo() and list(loaded) == list(BLOCKS)
    assert all(torch.equal(loaded[tap], made(BLOCKS).vectors[tap]) for tap in BLOCKS)


@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path: Path, ending: str) -> None:
    whole, cut = tmp_path / f"v.{ending}", tmp_path / f"cut.{ending}"
    made(BLOCKS).save(whole)
    content = whole.read_bytes()
    # gguf pads its last tensor: the file is whole without that
    needed = len(content) if ending == "safetensors" else len(content) - (-4 * D) % 32
    for length in (*range(0, needed, 7), needed - 1):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"cut.{ending}: this is not a whole {ending} file"):
            SteeringVectors.load(cut)
    with pytest.raises(ValueError, match=rf"none.{ending} cannot be read: No such file"):
        SteeringVectors.load(tmp_path / f"none.{ending}")
    (tmp_path / f"folder.{ending}").mkdir()
    with pytest.raises(ValueError, match=rf"folder.{ending}"):
        SteeringVectors.load(tmp_path / f"folder.{ending}")


@pytest.mark.parametrize(
    ("tensors", "arch", "message"),
    [
        ({"direction.1": np.ones(D, np.float32)}, "llama", "holds llama, not a controlvector"),
        ({"direction.1": np.ones(D, np.float16)}, "controlvector", "direction.1 is F16, not F32"),
        ({"direction.1": np.ones((2, D), np.float32)}, "controlvector", "layer 1 has shape"),
        ({"direction.1": np.full(D, np.nan, np.float32)}, "controlvector", "layer 1 is not finite"),
        ({"direction.x": np.ones(D, np.float32)}, "controlvector", "direction.x is no direction.K"),
        ({"direction.01": np.ones(D, np.float32)}, "controlvector", "01 is no direction.K"),
        ({}, "controlvector", "there are no steering vectors"),
    ],
)
def test_another_gguf_is_refused(
    tmp_path: Path, tensors: dict[str, Any], arch: str, message: str
) -> None:
    write_gguf(tmp_path / "v.gguf", tensors, arch)
    with pytest.raises(ValueError, match=f"v.gguf: .*{message}"):
        SteeringVectors.load(tmp_path / "v.gguf")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mlp_out.1": torch.ones(D, dtype=torch.float16)}, "mlp_out.1 is torch.float16"),
        ({"mlp_out.1": torch.ones(2, D)}, "mlp_out of layer 1 has shape"),
        ({"mlp_out.1": torch.full((D,), float("nan"))}, "mlp_out of layer 1 is not finite"),
        ({"mlp_out.9": torch.ones(D)}, "layer 9 does not exist"),
        ({"mlp_outt.1": torch.ones(D)}, "mlp_outt.1 is no POINT.LAYER"),
        ({}, "there are no steering vectors"),
    ],
)
def test_other_tensors_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "v.safetensors", saved_metadata(tmp_path))
    with pytest.raises(ValueError, match=f"v.safetensors: .*{message}"):
        SteeringVectors.load(tmp_path / "v.safetensors")


def saved_metadata(folder: Path) -> dict[str, str]:
    """The metadata of a good file, without norms."""
    vectors = dataclasses.replace(made([Tap(1, "resid_post")]), resid_norms={})
    vectors.save(folder / "good.safetensors")
    with safe_open(folder / "good.safetensors", framework="pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "pt"}, "does not hold steering vectors of shardlens"),
        ({"version": "2"}, "version 2 of the format needs a newer shardlens"),
        ({"version": None}, "metadata version is missing"),
        ({"n_layers": "six"}, "metadata n_layers is 'six', not a whole number"),
        ({"n_layers": "0"}, "metadata n_layers is '0'"),
        ({"resid_norms": "{"}, "metadata resid_norms is no JSON"),
        ({"resid_norms": "[]"}, "metadata resid_norms is no JSON object"),
        ({"resid_norms": "[" * 100_000}, "metadata resid_norms is nested too deep"),
        ({"origin": "9" * 5000}, "metadata origin is no JSON"),
        (
            {"resid_norms": '{"resid_post.1": 1%s}' % ("0" * 400)},
            "resid_norms: resid_post.1 is 1000",
        ),
        ({"resid_norms": '{"resid_post.1": "big"}'}, "resid_norms: resid_post.1 is 'big'"),
        (
            {"resid_norms": '{"resid_post.1": NaN}'},
            "resid_norms: resid_post.1 is nan, which is not finite",
        ),
        ({"resid_norms": '{"resid_post.2": 1}'}, "given at resid_post of layer 2, but no vector"),
        ({"origin": None}, "metadata origin is missing"),
        ({"origin": '{"n_pairs": "2"}'}, "metadata origin: n_pairs is '2'"),
        ({"origin": '{"pair_keys": [1]}'}, "metadata origin: pair_keys is None"),
    ],
)
def test_wrong_metadata_is_refused(
    tmp_path: Path, changed: dict[str, str | None], message: str
) -> None:
    texts = {**saved_metadata(tmp_path), **changed}
    metadata = {name: text for name, text in texts.items() if text is not None}
    ours = {f"shardlens__{name}": text for name, text in metadata.items() if name != "format"}
    save_file({"resid_post.1": torch.ones(D)}, tmp_path / "v.safetensors", metadata)
    with pytest.raises(ValueError, match=f"v.safetensors: .*{message}"):
        SteeringVectors.load(tmp_path / "v.safetensors")
    if "format" not in changed:
        write_gguf(tmp_path / "v.gguf", {"direction.1": np.ones(D, np.float32)}, **ours)
        with pytest.raises(ValueError, match=f"v.gguf: .*{message}"):
            SteeringVectors.load(tmp_path / "v.gguf")


def test_metadata_of_a_later_release_may_say_more(tmp_path: Path) -> None:
    metadata = saved_metadata(tmp_path)
    metadata["origin"] = json.dumps({**json.loads(metadata["origin"]), "shoe_size": 43})
    save_file({"resid_post.1": torch.ones(D)}, tmp_path / "v.safetensors", metadata)
    assert SteeringVectors.load(tmp_path / "v.safetensors").origin == ORIGIN
