"""Text of a growing list of tokens, given out as soon as it is certain."""

from __future__ import annotations

from gemma_nb.text.tokenizer import Tokenizer

_BROKEN = "\ufffd"


class StreamingDetokenizer:
    """Decodes token by token and never shows half a character.

    The outputs of `feed` and `finish` joined are `tokenizer.decode(ids)`.  A character that is
    spelled in byte pieces appears with its last byte, so `feed` may return "".
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = bytearray()  # of byte pieces, at most 3: the start of one character

    def feed(self, token_id: int) -> str:
        """The text that `token_id` made certain."""
        byte = self._tokenizer.byte_value(token_id)
        if byte is None:
            return self.finish() + self._tokenizer.decode([token_id])
        self._bytes.append(byte)
        text = ""
        while self._bytes:
            try:
                text += self._bytes.decode("utf-8")
                self._bytes.clear()
            except UnicodeDecodeError as error:
                if error.start == 0 and error.end == len(self._bytes) and _may_go_on(error):
                    break
                # Like SentencePiece: one U+FFFD for a byte that begins no character, then go on.
                text += _BROKEN
                del self._bytes[0]
        return text

    def finish(self) -> str:
        """What is left of an unfinished character: one U+FFFD per byte."""
        rest = _BROKEN * len(self._bytes)
        self._bytes.clear()
        return rest


def _may_go_on(error: UnicodeDecodeError) -> bool:
    """Whether the bytes are the valid beginning of a character."""
    return error.reason == "unexpected end of data"
