"""Turn text and chat messages into token ids as a server sees them, special tokens once each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import jinja2
import torch

from fp8kv.calibrate.data.columns import Content
from fp8kv.recipes.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatTemplate = Literal["auto", "always", "never"]


def encode_content(
    tokenizer: PreTrainedTokenizerBase, content: Content, where: str, chat_template: ChatTemplate
) -> list[int]:
    """Return the token ids of what a row says.

    Args:
        tokenizer: the model's tokenizer.
        content: what the row says.
        where: the row's place, for error messages.
        chat_template: ``auto`` renders conversations by the tokenizer's chat template, without a
            generation prompt, and takes the rest as plain text; ``always`` renders everything;
            ``never`` nothing.

    Raises:
        DataError: the tokenizer has no chat template and needs one, or the template refuses the
            messages.
    """
    if chat_template == "never" or (chat_template == "auto" and not content.is_chat):
        return _encode_text(tokenizer, content.text)
    if getattr(tokenizer, "chat_template", "") is None:
        raise DataError(
            f"{where} is to be rendered as chat messages, but the model's tokenizer has no chat "
            "template: name another dataset or a column of plain text, or set chat_template "
            "to 'never' in the recipe to take messages as plain text"
        )
    try:
        text = tokenizer.apply_chat_template(
            content.messages, tokenize=False, add_generation_prompt=False
        )
    # Templates are programs: besides raising on purpose they trip over missing keys and odd types.
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(
            f"the chat template refuses the messages of {where} ({error}); remove them or name a "
            "column of plain text with column="
        ) from error
    return _encode_bare(tokenizer, text)  # the template has written the special tokens already


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, blocks: Iterable[str], seq_len: int
) -> list[torch.Tensor]:
    """Cut one long text into consecutive pieces of ``seq_len`` tokens; the last may be shorter.

    Each piece begins with the tokens that the tokenizer puts before a text (BOS, where it does),
    because the first token of a sequence draws attention as no other does.

    Args:
        tokenizer: the model's tokenizer.
        blocks: the text, cut at line ends only, so that a word is never split between two blocks.
        seq_len: tokens in a piece, the prefix included.

    Returns:
        The pieces in the text's order, each [tokens] int32.

    Raises:
        DataError: ``seq_len`` leaves no room beside the prefix.
    """
    prefix = torch.tensor(_text_prefix(tokenizer), dtype=torch.int32)
    width = seq_len - len(prefix)
    if width < 1:
        raise DataError(
            f"a sequence length of {seq_len} has no room for text: the tokenizer begins each "
            f"sequence with {len(prefix)} special tokens; raise --seq-len"
        )
    buffer = array("i")  # four bytes a token where a list takes 36
    for block in blocks:
        buffer.extend(_encode_bare(tokenizer, block))
    if not buffer:
        return []
    tokens = torch.frombuffer(buffer, dtype=torch.int32)
    starts = range(0, len(tokens), width)
    return [torch.cat((prefix, tokens[start : start + width])) for start in starts]


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of ``text`` with the special tokens that the tokenizer adds by itself."""
    # verbose=False: no warning that a text is longer than the model's window; it is cut afterwards.
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _encode_bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text, not those after it."""
    probe = "text"
    whole, bare = _encode_text(tokenizer, probe), _encode_bare(tokenizer, probe)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []
