"""The prompt, token for token as transformers' Llama tokenizers make it, and text back from tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from repository import CHECKPOINT

from lite.config import IMAGE_TOKEN_ID, DecodingDefaults, PromptTemplate
from lite.errors import ArtifactError, ContextLengthError, PromptError
from lite.prompt import PromptEncoder, TextStream, Tokenizer

BOS = 1
HEAD = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)
TEXTS = [
    "Hello",
    "Cough and fever for 3 days, r/o pneumonia.",
    "two  spaces   three",
    " leading",
    "trailing ",
    "   ",
    "tab\there",
    "line\nbreak\n\ntwo",
    "é ü ñ Å e\u0301",
    "😀 🏥👩‍⚕️ ok",
    "漢字かな",
    "no\u00a0break ﬁ ½",
    "▁ underscore▁",
    "<0x0A> {question} {reason} <pad> [INST]",
    "\x00 nul",
    "12345 3.4 cm 1e-6",
]


@pytest.fixture(scope="module", params=["tiny", "demo"])
def tokenizer_file(
    request: pytest.FixtureRequest, tokenizer_model: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "demo":
        demo = CHECKPOINT / "base" / "tokenizer.model"
        if not demo.is_file():
            pytest.skip("the demo checkpoint is not here")
        return demo
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(tokenizer_model)
    return file


@pytest.fixture
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(tokenizer_file, DecodingDefaults())


def encoder(tokenizer: Tokenizer, *, max_seq_len: int = 4096, **template: str) -> PromptEncoder:
    return PromptEncoder(tokenizer, PromptTemplate(**template), num_image_tokens=64, max_seq_len=max_seq_len)


@pytest.fixture
def prompt(tokenizer: Tokenizer) -> PromptEncoder:
    return encoder(tokenizer)


def slow_llama_tokenizer(file: Path) -> Any:
    """The tokenizer the model was trained with: SentencePiece inside, special tokens split off before."""
    # Not part of transformers' public surface, but in each version that constraints.txt pins: should it go, the check
    # must fail and not skip itself.
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    return SentencePieceBackend(vocab_file=str(file), legacy=True, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("text", TEXTS)
def test_chunks_like_the_slow_llama_tokenizer(tokenizer: Tokenizer, tokenizer_file: Path, text: str) -> None:
    theirs = slow_llama_tokenizer(tokenizer_file)
    assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert tokenizer.encode(f"\n{text}") == theirs(f"\n{text}", add_special_tokens=False).input_ids


@pytest.mark.parametrize("reason", [None, *(text for text in TEXTS if "\0" not in text)])
def test_prompts_like_llamatokenizer(prompt: PromptEncoder, tokenizer_file: Path, reason: str | None) -> None:
    import transformers

    theirs = transformers.LlamaTokenizer.from_pretrained(tokenizer_file.parent)
    question = "Provide a description of the findings in the radiology image"
    if reason is None or not reason.strip():
        question += "."
    else:
        question += f" given the following indication: {reason}".replace("\n", " ")
    before = theirs(HEAD, add_special_tokens=False).input_ids
    after = theirs(f"\n{question} ASSISTANT:", add_special_tokens=False).input_ids
    assert prompt.encode(reason) == [BOS, *before, IMAGE_TOKEN_ID, *after]


def test_decoding_like_llamatokenizer(tokenizer: Tokenizer, tokenizer_file: Path) -> None:
    import transformers

    theirs = transformers.LlamaTokenizer.from_pretrained(tokenizer_file.parent)
    for text in TEXTS:
        ids = [1, *tokenizer.encode(text), 0, 2]
        assert (
            tokenizer.decode(ids)
            == theirs.decode(ids, skip_special_tokens=True).strip()
            == text.replace("▁", " ").strip()
        )


def test_bos_once_and_image_once(prompt: PromptEncoder) -> None:
    input_ids = prompt.encode("cough")
    assert input_ids[0] == BOS
    assert input_ids.count(BOS) == input_ids.count(IMAGE_TOKEN_ID) == 1
    assert prompt.num_tokens(input_ids) == len(input_ids) - 1 + 64


ASKS = "\nProvide a description of the findings in the radiology image given the following indication: "


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"reason": "cough\nfever\r\nchills"}, f"{ASKS}cough fever chills ASSISTANT:"),
        ({"reason": "{question} {reason} {0} %s"}, ASKS + "{question} {reason} {0} %s ASSISTANT:"),
        ({"query": "Describe the chest x-ray.\n"}, "\nDescribe the chest x-ray.\n ASSISTANT:"),
    ],
)
def test_words_of_the_template(prompt: PromptEncoder, tokenizer: Tokenizer, asked: Any, said: str) -> None:
    """Line breaks of a reason become spaces, those of a query stay; braces are text."""
    input_ids = prompt.encode(**asked)
    at = input_ids.index(IMAGE_TOKEN_ID)
    assert tokenizer.decode_unstripped(input_ids[:at]) == HEAD
    assert tokenizer.decode_unstripped(input_ids[at + 1 :]) == said


@pytest.mark.parametrize("blank", ["", " ", "\n\t "])
def test_a_blank_reason_is_no_reason(prompt: PromptEncoder, blank: str) -> None:
    assert prompt.encode(blank) == prompt.encode(None) != prompt.encode("x")


def test_line_breaks_around_a_reason_are_not_part_of_it(prompt: PromptEncoder) -> None:
    """A file of one line ends with one."""
    assert prompt.encode("cough\n") == prompt.encode("\r\ncough") == prompt.encode("cough")
    assert prompt.encode("cough ") != prompt.encode("cough")


@pytest.mark.parametrize("char", ["\0", "\x1b", "\x7f", "\x85"])
def test_control_characters_are_refused_by_name(prompt: PromptEncoder, char: str) -> None:
    with pytest.raises(PromptError, match="control character .* in the reason") as refused:
        prompt.encode(f"cough{char}fever")
    assert repr(char) in str(refused.value)
    prompt.encode("a tab\tis none")


@pytest.mark.parametrize("token", ["<image>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:"])
@pytest.mark.parametrize("argument", ["reason", "query"])
def test_what_the_prompt_has_of_its_own_cannot_be_smuggled_in(prompt: PromptEncoder, token: str, argument: str) -> None:
    values: dict[str, Any] = {argument: f"cough {token} fever"}
    with pytest.raises(PromptError, match=f"got {token} in the {argument}"):
        prompt.encode(**values)


def test_reasons_that_are_not_text(prompt: PromptEncoder) -> None:
    not_text: Any = float("nan")  # what a table reader makes of an empty cell
    with pytest.raises(PromptError, match=r"type float \(nan\) .* None"):
        prompt.encode(not_text)
    with pytest.raises(PromptError, match="not Unicode"):
        prompt.encode("bad \ud800 surrogate")


def test_query_excludes_reason(prompt: PromptEncoder) -> None:
    with pytest.raises(PromptError, match="a reason and a query"):
        prompt.encode("cough", query="What is seen?")
    with pytest.raises(PromptError, match="empty query"):
        prompt.encode(query=" \n")


def test_context_length_is_exact(tokenizer: Tokenizer) -> None:
    needed = encoder(tokenizer).num_tokens(encoder(tokenizer).encode("cough"))
    encoder(tokenizer, max_seq_len=needed + 1).encode("cough")
    with pytest.raises(ContextLengthError, match=rf"64 image tokens, {needed} in all · expected at most {needed - 1}"):
        encoder(tokenizer, max_seq_len=needed).encode("cough")
    with pytest.raises(ContextLengthError, match="shorten the query"):
        encoder(tokenizer, max_seq_len=needed).encode(query="word " * 100)


@pytest.mark.parametrize(
    "template",
    [
        {"conversation": "no image {question}"},
        {"conversation": "<image> <image> {question}"},
        {"conversation": "<image>"},
        {"question_with_reason": "no place"},
    ],
)
def test_a_template_without_its_places_is_refused(tokenizer: Tokenizer, template: dict[str, str]) -> None:
    with pytest.raises(ArtifactError, match="in the prompt template"):
        encoder(tokenizer, **template)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(i) for i in ids), stream.finish()]


@pytest.mark.parametrize("text", [*TEXTS, "  both ends  ", "", "one. two\n", "x\ufffdy\ufffd"])
def test_streamed_pieces_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"


def test_any_tokens_stream_to_their_text(tokenizer: Tokenizer) -> None:
    """A model may write bytes that are no UTF-8, special tokens in the middle, ids beyond the tokenizer."""
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size + 8) for _ in range(rng.randrange(12))]
        ids += [rng.randrange(3, 259) for _ in range(rng.randrange(6))]  # bytes
        rng.shuffle(ids)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_streaming_does_not_wait_for_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The lungs are clear. No effusion.")
    pieces = streamed(tokenizer, ids)
    assert sum(bool(piece) for piece in pieces) > 3
    assert pieces[-1] == ""


def test_damaged_or_foreign_tokenizer(tmp_path: Path, tokenizer_model: bytes) -> None:
    file = tmp_path / "tokenizer.model"
    half, no_text = tokenizer_model[: len(tokenizer_model) // 2], tokenizer_model.replace(b"<0x20>", b"<0\x8020>")
    for content in (b"", b"garbage", half, no_text):
        file.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"tokenizer\.model: got"):
            Tokenizer(file, DecodingDefaults())
    file.write_bytes(tokenizer_model)
    with pytest.raises(ArtifactError, match=r"ids \(1, 2\) · expected \(1, 5\)"):
        Tokenizer(file, DecodingDefaults(eos_token_id=5))


def test_the_fixture_needs_byte_fallback(tokenizer_file: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    assert pieces.is_byte(pieces.encode("😀")[-1]), "without it the tests above would not test bytes"
