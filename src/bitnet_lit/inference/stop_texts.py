"""Stop texts end a generated text and never show in it, whatever pieces the text comes in.

A tokenizer's pieces do not end where a stop text ends: "cake." may come as "ca", "ke. A". So text that could be the
beginning of a stop text is held back until it is certain. Each character costs a constant amount of work for each stop
text, by the algorithm of Knuth, Morris and Pratt (1977).
"""

from __future__ import annotations

from collections.abc import Sequence


class _Stop:
    """Finds one stop text in a text that is fed character by character.

    Attributes:
        matched: how many characters of the stop text the fed text ends with.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        # For each beginning of the stop text: the length of the longest shorter beginning that it ends with. A match
        # that breaks goes on from there.
        self._shorter = [0]
        for end in range(1, len(text)):
            length = self._shorter[end - 1]
            while length and text[length] != text[end]:
                length = self._shorter[length - 1]
            self._shorter.append(length + (text[length] == text[end]))

    def feed(self, character: str) -> bool:
        """Return whether the stop text is complete with this character."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self.text[self.matched] == character
        return self.matched == len(self.text)


class StopFilter:
    """Passes text on up to the first stop text.

    The stop text that is complete first ends the text; of several that are complete at once, the longest counts.

    Args:
        stops: the stop texts; an empty one stops nothing.

    Attributes:
        stopped: whether a stop text was complete. Nothing may be fed after that.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [_Stop(stop) for stop in dict.fromkeys(stops) if stop]
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Take the next piece. Return the text that is certain to belong to no stop text."""
        before = self._held
        self._held += text
        if not self._stops:
            return self.flush()
        for end, character in enumerate(text, len(before) + 1):
            complete = [stop.matched for stop in self._stops if stop.feed(character)]
            if complete:
                self.stopped = True
                return self._held[: end - max(complete)]
        keep = max(stop.matched for stop in self._stops)
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return passed

    def flush(self) -> str:
        """Return the text that is still held back, at the end of the whole text."""
        held, self._held = self._held, ""
        return held
