"""Makes the demo model's tokenizer: byte-level BPE over the demo prose, every digit a token.

Any text can be encoded and decoded without loss; texts of the demo tasks come out at about one
token per word. Knows nothing about models.
"""

from __future__ import annotations

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from homer.demo import prose, tasks

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB_SIZE = 1536
# The model knows no turns: a chat is its texts, a line each, as in its tasks.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)
_CORPUS_SENTENCES = 20_000
# A word with the space before it, one digit, a run of other signs, or white space.
_PIECES = r" ?[A-Za-z']+|[0-9]|[^\sA-Za-z0-9]+|\s"


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on prose, statements and questions drawn from ``seed``.

    Like Llama's it puts the beginning-of-sequence token in front unless told not to.
    """
    rng = random.Random(f"tokenizer/{seed}")
    corpus = [" " + prose.sentence(rng) for _ in range(_CORPUS_SENTENCES)]
    # Chunks and documents begin anywhere: words without a space before them are needed too.
    corpus += [prose.sentence(rng) for _ in range(_CORPUS_SENTENCES // 10)]
    for place in [None, *prose.PLACES]:
        key = tasks.draw_key(rng)
        corpus += 10 * [tasks.PREFIX, " " + tasks.statement(place, key), tasks.question(place)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
