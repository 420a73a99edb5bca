"""Tokenizers small enough to train in a test, with the conventions and chat templates of the large families."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# What Llama 3 and Qwen merge within: a word with the sign or space before it, up to three digits, line breaks.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CORPUS = (
    "the cat sat on the mat and the dog ran to the park",
    "a good answer is short and true, a bad answer is long and wrong",
    "once upon a time there was a little girl who liked to read",
    "two line breaks merge\n\n",
    "as they do in most tokenizers\n\n",
)

LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
WITHOUT_END = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
# Prompts for reasoning, renders the turn without it (DeepSeek R1's way).
THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
# Opens every answer with an empty thought and cuts what was thought (Qwen 3's way).
STRIPPING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' + message['content'].split('</think>')[-1].lstrip('\n') }}{% else %}"
    "{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    extra: tuple[str, ...] = (),
    template: str | None = None,
    writes_bos: bool = True,
) -> Any:
    """Byte-level BPE, so that decoding is exact; BOS, if any, stands before every plain text unless told not to."""
    special = list(dict.fromkeys(token for token in (bos, eos, *extra) if token))
    core = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), to_bytes])
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if bos and writes_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def sentence_piece() -> Any:
    """BPE in SentencePiece's way: a space is put before every text, and what is not ASCII is unknown."""
    space = "\u2581"
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    core.pre_tokenizer = pre_tokenizers.Split(space, "merged_with_next")  # no merge reaches over two words
    alphabet = [space, "\n", *(chr(code) for code in range(33, 127))]
    special = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=180, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def family(name: str) -> Any:
    """A tokenizer with the template and the special tokens of one family of chat models."""
    return {
        "llama3": lambda: byte_level(
            bos="<|begin_of_text|>",
            eos="<|eot_id|>",
            extra=("<|start_header_id|>", "<|end_header_id|>"),
            template=LLAMA3,
        ),
        "chatml": lambda: byte_level(bos=None, eos="<|im_end|>", extra=("<|im_start|>",), template=CHATML),
        "chatml_base": lambda: byte_level(
            bos=None, eos="<|endoftext|>", extra=("<|im_start|>", "<|im_end|>"), template=CHATML
        ),
        "gemma": lambda: byte_level(
            bos="<bos>", eos="<eos>", extra=("<start_of_turn>", "<end_of_turn>"), template=GEMMA
        ),
        "zephyr": lambda: byte_level(template=ZEPHYR),
        "two_marks": lambda: byte_level(
            bos=None,
            eos="</s>",
            extra=("<|im_start|>", "<|im_end|>"),
            template=CHATML.replace("'\n' }}{% endf", "'</s>' }}{% endf"),
        ),
        "mistral": lambda: byte_level(template=MISTRAL),
        "without_end": lambda: byte_level(template=WITHOUT_END),
        "thinking": lambda: byte_level(bos=None, eos="<|im_end|>", extra=("<|im_start|>",), template=THINKING),
        "stripping": lambda: byte_level(bos=None, eos="<|im_end|>", extra=("<|im_start|>",), template=STRIPPING),
    }[name]()
