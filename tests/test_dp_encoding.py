from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tiny_text import BOS, EOS, causal_tokenizer
from veiltune.data.prompts import Prompted
from veiltune.dp.encoding import (
    PROMPT_RULE,
    TEXT_RULE,
    Classified,
    Encoded,
    collate,
    encode_prompted,
    encode_texts_with_labels,
    prompt_ids,
)
from veiltune.errors import DataError, InputError

SECRET = "zebra-4711"


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return causal_tokenizer()


def words(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def shown(tokenizer: Any, prompt: str, target: str, max_length: int, **options: Any) -> tuple[str, str, int]:
    """The example as text, its labelled part as text, and how many were cut."""
    result = encode_prompted(tokenizer, Prompted([prompt], [target]), max_length=max_length, **options)
    (example,) = result.examples
    labelled = [label for label in example.labels if label != -100]
    assert len(example.input_ids) == len(example.labels) <= max_length
    assert all(label in (-100, token) for label, token in zip(example.labels, example.input_ids, strict=True))
    return words(tokenizer, example.input_ids), words(tokenizer, labelled), result.cut


@pytest.mark.parametrize(
    ("prompt", "target", "max_length", "example", "labelled", "cut"),
    [
        ("abc", "XYZ", 9, "abc\nXYZ<eos>", "XYZ<eos>", 0),
        ("abc", "XYZ", 8, "abc\nXYZ<eos>", "XYZ<eos>", 0),  # exactly full
        ("abc", "XYZ", 7, "bc\nXYZ<eos>", "XYZ<eos>", 1),  # the prompt loses its beginning
        ("abcdefgh", "X", 6, "fgh\nX<eos>", "X<eos>", 1),
        ("a", "UVWXYZ", 6, "a\nUVWX", "UVWX", 1),  # the target loses its end, eos with it
        ("abcdefgh", "TUVWXYZ", 6, "gh\nTUV", "TUV", 1),  # half and half
        ("abcdefgh", "TUVWXYZ", 7, "gh\nTUVW", "TUVW", 1),
        ("abcdefgh", "TUVWXYZ", 2, "\nT", "T", 1),
    ],
)
def test_the_form_and_the_rule(
    plain: Any, prompt: str, target: str, max_length: int, example: str, labelled: str, cut: int
) -> None:
    assert shown(plain, prompt, target, max_length) == (example, labelled, cut)


def test_loss_on_all_skips_only_the_first(plain: Any) -> None:
    assert shown(plain, "abc", "XYZ", 9, loss_on="all") == ("abc\nXYZ<eos>", "bc\nXYZ<eos>", 0)
    assert shown(plain, "abc", "XYZ", 7, loss_on="all") == ("bc\nXYZ<eos>", "c\nXYZ<eos>", 1)


def test_plain_language_modelling(plain: Any) -> None:
    assert shown(plain, "", "XYZ", 4) == ("XYZ<eos>", "YZ<eos>", 0)  # nothing predicts the first token
    assert shown(plain, "", "XYZ", 3) == ("XYZ", "YZ", 1)
    result = encode_prompted(plain, Prompted([""], ["XYZ"]), max_length=3)
    assert result.note() == f"1 were longer than 3 tokens and were cut: {TEXT_RULE}"


def test_a_tokenizer_that_begins_texts() -> None:
    tokenizer = causal_tokenizer(begins=True)
    assert shown(tokenizer, "abc", "XYZ", 20) == ("<bos>abc\nXYZ<eos>", "XYZ<eos>", 0)
    assert shown(tokenizer, "abc", "XYZ", 8) == ("<bos>bc\nXYZ<eos>", "XYZ<eos>", 1)  # bos stays
    assert shown(tokenizer, "abc", "TUVWXYZ", 6) == ("<bos>c\nTUV", "TUV", 1)
    assert shown(tokenizer, "", "XYZ", 5) == ("<bos>XYZ<eos>", "XYZ<eos>", 0)
    assert prompt_ids(tokenizer, ["", "a"])[0] == [BOS]


def test_a_special_token_as_separator(plain: Any) -> None:
    assert shown(plain, "abc", " XYZ", 20, separator="<eos>") == ("abc<eos> XYZ<eos>", " XYZ<eos>", 0)
    assert prompt_ids(plain, ["a"], separator="<eos>")[0][-1] == EOS


def test_random_lengths_against_the_rule(plain: Any) -> None:
    """Whatever the lengths: never too long, a target part that trains, and nothing cut that would have fitted."""
    rng = random.Random(0)
    for _ in range(200):
        prompt, target = "p" * rng.randint(1, 30), "t" * rng.randint(1, 30)
        max_length = rng.randint(2, 40)
        text, labelled, cut = shown(plain, prompt, target, max_length)
        length = len(text) - 4 * text.endswith("<eos>")
        whole = len(prompt) + len(target) + 2
        assert cut == (whole > max_length) and length == min(whole, max_length)
        head = text.index("\n") + 1
        assert head >= min(len(prompt) + 1, max_length // 2)
        assert length - head >= min(len(target) + 1, max_length - max_length // 2)
        assert text[head:] == labelled


def test_prompt_at_generation_begins_the_example(plain: Any) -> None:
    prompted = Prompted(["ab", "abcdef"], ["X", "YZ"])
    encoded = encode_prompted(plain, prompted, max_length=20)
    for head, example in zip(prompt_ids(plain, prompted.prompts), encoded.examples, strict=True):
        assert example.input_ids[: len(head)] == head
        assert example.labels[: len(head)] == [-100] * len(head) and -100 not in example.labels[len(head) :]
    assert [words(plain, head) for head in prompt_ids(plain, prompted.prompts, max_length=4)] == ["ab\n", "def\n"]


def test_counts_and_words(plain: Any) -> None:
    result = encode_prompted(plain, Prompted(["a" * 9, "b", "c" * 9], ["X", "Y", "Z"]), max_length=8)
    assert (len(result), result.cut, result.rule) == (3, 2, PROMPT_RULE)
    assert result.note().startswith("2 were longer than 8 tokens and were cut: the prompt keeps its end")
    assert repr(result.examples[1]) == "Encoded(4 tokens, 2 with loss)"
    short = encode_prompted(plain, Prompted(["a"], ["X"]), max_length=8)
    assert repr(short) == "EncodedSet(1 examples; none was longer than 8 tokens)"


def test_refusals(plain: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    prompted = Prompted(["a"], [SECRET])
    with pytest.raises(InputError, match="the tokenizer has no eos_token_id, which marks the end of a target"):
        encode_prompted(tokenizer, prompted, max_length=8)
    with pytest.raises(InputError, match="max_length must be at least 6 for this tokenizer and separator, got 5"):
        encode_prompted(plain, prompted, max_length=5, separator="---")
    with pytest.raises(InputError, match="max_length must be at least 2"):
        encode_prompted(plain, prompted, max_length=1)
    with pytest.raises(InputError, match="max_length must be a whole number of at least 1, got 0"):
        encode_prompted(plain, prompted, max_length=0)
    with pytest.raises(InputError, match="loss_on 'targets' is unknown; did you mean 'target'"):
        encode_prompted(plain, prompted, max_length=8, loss_on="targets")  # type: ignore[arg-type]


def test_a_target_without_tokens_is_refused() -> None:
    from tokenizers import normalizers

    tokenizer = causal_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("#", "")
    with pytest.raises(DataError, match="the target of row 2 has no tokens"):
        encode_prompted(tokenizer, Prompted(["a", "a"], ["x", "##"]), max_length=8)
    with pytest.raises(DataError, match="the text of row 1 has no tokens"):
        encode_texts_with_labels(tokenizer, ["#"], [0], max_length=8)


def test_texts_with_labels(tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]) -> None:
    texts = ["abc", "abcd", "abcdefgh"]  # [CLS] and [SEP] make 5, 6 and 10 tokens of them
    result = encode_texts_with_labels(tokenizer, texts, [1, 0, 2], max_length=6)
    whole = [list(tokenizer(text)["input_ids"]) for text in texts]
    assert [example.input_ids for example in result.examples] == [whole[0], whole[1], [*whole[2][:5], whole[2][-1]]]
    assert [example.label for example in result.examples] == [1, 0, 2] and result.cut == 1
    assert repr(result.examples[0]) == "Classified(5 tokens)"
    with pytest.raises(DataError, match="classes must be one a text, got 1 for 3 texts"):
        encode_texts_with_labels(tokenizer, texts, [1], max_length=6)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate(side: str) -> None:
    lengths = (5, 1, 3)
    examples = [Encoded(list(range(10, 10 + length)), [-100, *range(11, 10 + length)][:length]) for length in lengths]
    batch = collate(examples, pad_id=7, padding_side=side)  # type: ignore[arg-type]
    assert set(batch) == {"input_ids", "attention_mask", "labels"} | ({"position_ids"} if side == "left" else set())
    assert all(values.shape == (3, 5) and values.dtype == torch.int64 for values in batch.values())
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        real = slice(0, length) if side == "right" else slice(5 - length, 5)
        assert batch["input_ids"][row, real].tolist() == example.input_ids
        assert batch["labels"][row, real].tolist() == example.labels
        mask = torch.zeros(5, dtype=torch.int64)
        mask[real] = 1
        assert torch.equal(batch["attention_mask"][row], mask)
        assert (batch["input_ids"][row][mask == 0] == 7).all() and (batch["labels"][row][mask == 0] == -100).all()
        if side == "left":
            assert batch["position_ids"][row, real].tolist() == list(range(length))
            assert (batch["position_ids"][row][mask == 0] == 0).all()


def test_collate_of_classes() -> None:
    batch = collate([Classified([5, 6], 2), Classified([7], 0)], pad_id=0)
    assert batch["labels"].tolist() == [2, 0] and batch["input_ids"].tolist() == [[5, 6], [7, 0]]


def test_collate_refusals() -> None:
    with pytest.raises(InputError, match="collate needs at least one example"):
        collate([], pad_id=0)
    with pytest.raises(InputError, match="pad_id must be a token id, got None"):
        collate([Classified([1], 0)], pad_id=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="padding_side 'lft' is unknown; did you mean 'left'"):
        collate([Classified([1], 0)], pad_id=0, padding_side="lft")  # type: ignore[arg-type]


def test_long_texts_are_encoded_in_silence(plain: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = causal_tokenizer()
    tokenizer.model_max_length = 8
    encode_prompted(tokenizer, Prompted(["a" * 50], ["b" * 50]), max_length=8)
    assert capfd.readouterr() == ("", "")
