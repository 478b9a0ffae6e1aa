"""Small tokenizers of the three kinds that decode differently, made here so that no file is needed."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastgpt_jax import tokenizer as ours

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁the", "a", "b", "▁a", "é", "▁▁", "\n", "世"]


def make_byte_fallback() -> ours.Tokenizer:
    """Llama 2's kind: pieces with `▁` for a space, bytes for the rest, one leading space stripped."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *BYTE_TOKENS, *PIECES])}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return ours.Tokenizer(backend, bos_token_id=1, eos_token_ids=(2,), add_bos=True)


def make_byte_level() -> ours.Tokenizer:
    """GPT-2's kind: every byte a character of its own alphabet; characters of several bytes are cut anywhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("Ã", "©"), ("ä", "¸")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return ours.Tokenizer(backend, eos_token_ids=(len(tokens),))


def make_metaspace() -> ours.Tokenizer:
    """T5's kind: `▁` for a space, the first one not shown."""
    vocab = {token: i for i, token in enumerate(["<unk>", *PIECES])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return ours.Tokenizer(backend)


MAKERS = {"byte_fallback": make_byte_fallback, "byte_level": make_byte_level, "metaspace": make_metaspace}
