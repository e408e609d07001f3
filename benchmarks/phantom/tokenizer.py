"""The phantom's tokenizer: SentencePiece BPE with byte fallback, set up as Llama's is, learnt from the grammar."""

from __future__ import annotations

import io

import numpy as np
import sentencepiece

from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.report import write_findings, write_reason
from lite.config import PromptTemplate

VOCAB_SIZE = 1024
# English that the grammar does not use, so that free questions and other people's reasons are not spelt byte by byte.
_OTHER_ENGLISH = (
    "Describe the findings of the chest x-ray. Is there a change since the prior study? Evaluate for acute process. "
    "History of asthma, diabetes, hypertension, stroke, renal failure, transplant, liver disease, leukemia, anemia. "
    "Assess for interval change, please. Question of aspiration, infiltrate, nodules, free air. Status post biopsy. "
    "0 1 2 3 4 5 6 7 8 9 ( ) / : ; % + - ? ! ' \" & _ ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz"
)


def train_tokenizer(*, seed: int, sentence_count: int = 10_000) -> bytes:
    """Learn the tokenizer from prompts, reasons and findings of `sentence_count` studies; give the bytes of its model.

    The special ids are Llama's: unk 0, bos 1, eos 2. Pieces 3 to 258 are the 256 bytes.
    """
    rng = np.random.default_rng([seed, 2])
    template = PromptTemplate()
    before, after = template.conversation.split("<image>")

    def lines() -> list[str]:
        collected = [_OTHER_ENGLISH] * 40
        for index in range(sentence_count):
            study = sample_study(int(rng.integers(2**62)))
            reason = write_reason(study, rng)
            question = (
                template.question_without_reason
                if reason is None
                else template.question_with_reason.format(reason=reason)
            )
            collected.append(write_findings(study, rng).text)
            # The prompt is the same for everyone: one copy in ten is enough to learn its words whole.
            collected.extend((before, after.format(question=question).strip()) if index % 10 == 0 else [reason or ""])
        return [line for line in collected if line]

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_surface=" ⁇ ",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
