"""Conversion of ids to text during generation: whole characters, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxmodel.hub.tokenizer import Tokenizer, stream_decoder


class Writer:
    """The text of one row, token by token.

    Attributes:
      ids: the tokens so far, without the end token and with those of a stop string.
      text: their text, up to the stop string. It has no special tokens, but stop strings can match
        these.
      finish_reason: "eos", "stop" or "length"; None while the text is unfinished.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        prompt: Sequence[int] = (),
    ):
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._limit = max_new_tokens
        self._stop = stop
        self._eos = frozenset(tokenizer.eos_ids)
        self._decode = stream_decoder(tokenizer, after=prompt)
        self._tokenizer = tokenizer
        self._sent = 0
        self._whole = ""  # the text with its special tokens
        self._places: list[int] = []  # of each character of it, where it stands in the text

    def write(self, ids: Iterable[int]) -> None:
        """Add the next ids; those after the end are ignored."""
        for token in map(int, ids):
            if self.finish_reason:
                return
            if token in self._eos:
                self._finish("eos")
                return
            self.ids.append(token)
            self._add(self._decode(token), token)
            if len(self.ids) >= self._limit and not self.finish_reason:
                self._finish("length")

    def read(self) -> str:
        """Return the text since the last call that cannot be part of a stop string."""
        end = len(self.text)
        if not self.finish_reason:
            held = max((_overlap(self._whole, stop) for stop in self._stop), default=0)
            visible = max((_overlap(self.text, stop) for stop in self._stop), default=0)
            end = min(self._places[-held] if held else end, end - visible)
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _finish(self, reason: str) -> None:
        self._add(self._decode(None))
        self.finish_reason = self.finish_reason or reason

    def _add(self, piece: str, token: int | None = None) -> None:
        start = len(self.text)
        before = len(self._whole)
        self.text += piece
        self._whole += piece
        self._places += range(start, len(self.text))
        if token in self._tokenizer.special_ids:
            said = self._tokenizer.backend.id_to_token(token) or ""
            self._whole += said
            self._places += [len(self.text)] * len(said)
        found = [self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self._stop]
        if len(self._whole) > len(self.text):
            at = [self._whole.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop]
            found += [self._places[i] for i in at if i >= 0]
        if cut := [i for i in found if i >= 0]:
            self.text = self.text[: min(cut)]
            self.finish_reason = "stop"


def _overlap(text: str, stop: str) -> int:
    r"""Return how many characters at the end of `text` may be the beginning of `stop`.

    >>> _overlap("so\n", "\n\n")
    1
    """
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )
