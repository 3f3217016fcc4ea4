from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import tiny
from veiltune.errors import InputError
from veiltune.models.bundle import read_bundle, write_bundle
from veiltune.models.split import BottomModel, HeadModel, split_head, split_model

Write = Callable[..., str]


@pytest.fixture
def write(tokenizer: PreTrainedTokenizerFast) -> Write:
    def write(folder: Path, bottom: BottomModel, head: HeadModel | None = None) -> str:
        return write_bundle(folder, bottom, tokenizer, head=head, base_name="tiny", base_digest="0" * 64)

    return write


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("cut_layer", "cut_embeddings"), [(0, "word"), (0, "block"), (2, "word")])
def test_round_trip(family: str, cut_layer: int, cut_embeddings: str, tmp_path: Path, write: Write) -> None:
    model = tiny.tiny_model(family)
    bottom, top = split_model(model, cut_layer=cut_layer, cut_embeddings=cut_embeddings)
    trunk, head = split_head(top)
    digest = write(tmp_path / "bundle", bottom, head)
    bundle = read_bundle(tmp_path / "bundle", expected_digest=digest)
    ids, mask = tiny.tiny_batch(model.config)
    hidden = trunk(bottom(ids, mask), mask)
    assert bundle.head is not None
    assert torch.equal(bundle.bottom(ids, mask), bottom(ids, mask))
    assert torch.equal(bundle.head(hidden), head(hidden))
    assert (bundle.bottom.cut_layer, bundle.bottom.cut_embeddings) == (cut_layer, cut_embeddings)
    assert bundle.digest == digest and bundle.manifest["base_name"] == "tiny"
    assert not any(p.requires_grad for p in (*bundle.bottom.parameters(), *bundle.head.parameters()))
    assert bundle.tokenizer("Ab")["input_ids"] == [2, 69, 70, 3]


def test_no_tensor_of_the_top_is_in_it(tmp_path: Path, write: Write) -> None:
    bottom, top = split_model(tiny.tiny_model("bert"), cut_layer=2)
    write(tmp_path / "bundle", bottom)
    content = b"".join(path.read_bytes() for path in sorted((tmp_path / "bundle").iterdir()))
    assert all(p.detach().numpy().tobytes() in content for p in bottom.parameters())  # the search finds what is there
    for name, parameter in top.named_parameters():
        assert parameter.detach().numpy().tobytes() not in content, name
    config = json.loads((tmp_path / "bundle" / "bottom_config.json").read_bytes())
    assert config["num_hidden_layers"] == 2


def test_no_path_of_the_vendors_is_in_it(tiny_folder: Path, tmp_path: Path) -> None:
    from veiltune.models.loading import classifier_model, load_base

    base = load_base(str(tiny_folder))
    bottom, top = split_model(classifier_model(base, num_labels=2, seed=0), cut_layer=1)
    head = split_head(top)[1]
    folder = tmp_path / "bundle"
    write_bundle(folder, bottom, base.tokenizer, head=head, base_name=base.name, base_digest=base.digest)
    assert json.loads((folder / "manifest.json").read_bytes())["base_name"] == tiny_folder.name
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_digest_depends_on_the_parts_alone(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    bottom, _ = split_model(tiny.tiny_model("llama"), cut_layer=1)
    other, _ = split_model(tiny.tiny_model("llama", seed=1), cut_layer=1)
    first = write(tmp_path / "first", bottom)
    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=4)
    assert write(tmp_path / "second", bottom) == first
    assert write(tmp_path / "third", other) != first


def test_any_changed_byte_is_refused(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "bundle"
    bottom, top = split_model(tiny.tiny_model("bert"), cut_layer=1)
    digest = write(folder, bottom, split_head(top)[1])
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(InputError, match=r"altered file|has the digest|malformed") as refusal:
            read_bundle(folder, expected_digest=digest)
        assert "\n" not in str(refusal.value)
        if path.name != "manifest.json":
            with pytest.raises(InputError, match=f"altered file '{path.name}'"):
                read_bundle(folder)
        path.write_bytes(content)
    read_bundle(folder, expected_digest=digest)


def test_missing_extra_and_linked_files_are_refused(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "bundle"
    bottom, _ = split_model(tiny.tiny_model("bert"), cut_layer=1)
    write(folder, bottom)
    weights = folder / "bottom.safetensors"
    (folder / "modeling.py").write_text("")
    with pytest.raises(InputError, match=r"an extra file 'modeling.py'; fetch the bundle again"):
        read_bundle(folder)
    (folder / "modeling.py").unlink()
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"no file 'bottom.safetensors'"):
        read_bundle(folder)
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"altered file 'bottom.safetensors'"):
        read_bundle(folder)


def test_a_tokenizer_with_code_of_its_own_is_refused_and_nobody_is_asked(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    bottom, _ = split_model(tiny.tiny_model("bert"), cut_layer=1)
    folder, ran = tmp_path / "bundle", tmp_path / "ran"
    write(folder, bottom)
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Evil(PreTrainedTokenizerFast): pass\n"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("evil.py", "tokenizer_config.json"):
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(InputError):
        read_bundle(folder)
    assert not ran.exists()


def test_another_digest_is_refused_with_both(tmp_path: Path, write: Write) -> None:
    bottom, _ = split_model(tiny.tiny_model("bert"), cut_layer=1)
    digest = write(tmp_path / "bundle", bottom)
    with pytest.raises(InputError, match=f"has the digest {digest}, expected was {'f' * 64}"):
        read_bundle(tmp_path / "bundle", expected_digest="f" * 64)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"format": 2}', b'{"format": 1, "files": []}', b"\xff\xfe", b'{"format": 1}']
)
def test_malformed_manifest_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable bundle"):
        read_bundle(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"malformed|has format 2, this version reads 1"):
        read_bundle(tmp_path)


def test_consistent_nonsense_is_refused(tmp_path: Path, write: Write) -> None:
    """Whoever writes the manifest can make the digests fit; the content must then be refused in words."""
    import hashlib

    folder = tmp_path / "bundle"
    bottom, _ = split_model(tiny.tiny_model("bert"), cut_layer=1)
    write(folder, bottom)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, content in (("bottom.safetensors", b"pickle"), ("bottom_config.json", b'{"model_type": "t5"}')):
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        forged = manifest | {"files": manifest["files"] | {name: hashlib.sha256(content).hexdigest()}}
        (folder / "manifest.json").write_text(json.dumps(forged))
        with pytest.raises(InputError, match=r"unreadable \(SafetensorError\)|is for model_type 't5'"):
            read_bundle(folder)
        (folder / name).write_bytes(original)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"cut_layer": 3}))
    with pytest.raises(InputError, match="states another cut_layer"):
        read_bundle(folder)


def test_a_folder_in_use_is_refused(tmp_path: Path, write: Write) -> None:
    bottom, _ = split_model(tiny.tiny_model("bert"), cut_layer=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="must be empty"):
        write(tmp_path, bottom)
    assert (tmp_path / "notes.txt").read_text() == "mine"
