"""Small byte-level tokenizers and chat templates for tests, written as model directories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "Hello, how are you today? I am fine, thank you.",
    "User: What is 1+1?\n\nAssistant: It is 2.",
    "system user assistant model [INST] [/INST] <<SYS>>",
    "你好，世界！今天天气如何？臣妾做不到啊。",
    "def f(x):\n    return x\n",
] * 4

LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
]
DEEPSEEK_SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
CHATML_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_GENERATION = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% set talk = messages %}{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set talk = messages[1:] %}"
    "{% endif %}{% for message in talk %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MARKED = (  # role markers that no one flagged special, swallowing the white space after them
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GLM4 = (  # the part that writes plain messages; releases differ in whether a prompt ends in a line break
    "[gMASK]<sop>{% for item in messages %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n"
    "{{ item['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>LINE_BREAK{% endif %}"
)
GLM4_SPECIAL = [
    *("<|endoftext|>", "[gMASK]", "<sop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
]
QWEN3 = (  # the part of it that writes plain messages
    "{%- set ns = namespace(last_query=0) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last_query = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}{%- set thoughts = '' %}"
    "{%- if message.role == 'assistant' and '</think>' in content %}"
    "{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.index0 > ns.last_query and (loop.last or thoughts) %}"
    "{{- '<think>\n' + thoughts + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}"
)
ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


def byte_level(special: Sequence[str | AddedToken], words: Sequence[str | AddedToken] = ()) -> Tokenizer:
    """A byte-level BPE: every text survives it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(list(special))
    backend.add_tokens(list(words))
    return backend


def metaspace(special: Sequence[str], prepend_scheme: str) -> Tokenizer:
    """A sentencepiece-like BPE with byte fallback, as Llama-2 and Mistral have it."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for char in "▁" + "".join(sorted(set("".join(CORPUS)) - {" ", "\n"})):
        vocab.setdefault(char, len(vocab))
    merges = []
    for pair in (("▁", "a"), ("▁", "["), ("h", "e"), ("o", "u"), ("i", "s")):
        vocab.setdefault("".join(pair), len(vocab))
        merges.append(pair)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend_scheme == "legacy":
        prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        backend.normalizer = normalizers.Sequence([prepend, replace])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(list(special))
    return backend


def write(directory: Path, backend: Tokenizer, template: str | None = None, **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    tree = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    if template is not None:
        tree["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    return directory


def llama3_like(directory: Path) -> Path:
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return write(directory, byte_level(LLAMA3_SPECIAL), **names)


def deepseek_like(directory: Path) -> Path:
    words = [AddedToken(word, normalized=True) for word in "øüÿ"]
    bos, eos = DEEPSEEK_SPECIAL
    return write(directory, byte_level(DEEPSEEK_SPECIAL, words), bos_token=bos, eos_token=eos, pad_token=eos)


def chatml(directory: Path, template: str = CHATML) -> Path:
    return write(directory, byte_level(CHATML_SPECIAL), template, eos_token="<|endoftext|>")


def glm4_like(directory: Path, line_break: str = "\n") -> Path:
    template = GLM4.replace("LINE_BREAK", line_break)
    return write(directory, byte_level(GLM4_SPECIAL), template, eos_token="<|endoftext|>")


def qwen3_like(directory: Path, template: str = QWEN3, words: Sequence[str] = ()) -> Path:
    """`words` are one token each, but not special: "<think>" and "</think>" in the real vocabulary."""
    added = [AddedToken(word, special=False, normalized=False) for word in words]
    return write(directory, byte_level(CHATML_SPECIAL, added), template, eos_token="<|im_end|>")


def gemma_like(directory: Path) -> Path:
    backend = byte_level(["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"])
    return write(directory, backend, GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def llama2_like(directory: Path, prepend_scheme: str = "legacy") -> Path:
    special = ["<unk>", "<s>", "</s>"]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write(directory, metaspace(special, prepend_scheme), LLAMA2, **names)


def marked(directory: Path) -> Path:
    words = [
        AddedToken(f"<|{name}|>", rstrip=True, special=False)
        for name in ("user", "assistant", "system", "end")
    ]
    return write(directory, byte_level(["<|endoftext|>"], words), MARKED, eos_token="<|endoftext|>")
