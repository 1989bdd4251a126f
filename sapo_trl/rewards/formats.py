r"""Rewards for the form of a completion: box, thought, tags, language. They do not grade answers."""

import re
from dataclasses import dataclass

from sapo_trl.rewards.grading.extraction import find_boxes
from sapo_trl.rewards.grading.texts import THINK_CLOSE, THINK_OPEN, completion_text, prefilled_thoughts, visible_part


@dataclass(frozen=True)
class BoxedFormat:
    r"""1.0 when the visible part of the completion ends on a closed, non-empty `\boxed{...}`, else 0.0.

    The format reward of math recipes that ask for a boxed answer, e.g. SimpleRL-Zoo
    (https://arxiv.org/abs/2503.18892), restricted to the part that the reader sees.

    >>> BoxedFormat()([r"It is \boxed{5}.", r"It is \boxed{5", r"<think>\boxed{5}</think>It is 5."])
    [1.0, 0.0, 0.0]
    """

    prefilled: bool | None = None
    __name__ = "boxed_format_reward"

    def __call__(self, completions: list, prompts: list | None = None, **kwargs) -> list[float]:
        thoughts = prefilled_thoughts(len(completions), prompts, self.prefilled)
        texts = [visible_part(completion_text(c), thought) for c, thought in zip(completions, thoughts, strict=True)]
        return [float(_ends_on_box(text)) for text in texts]


def _ends_on_box(text: str) -> bool:
    boxes, unclosed = find_boxes(text)
    return bool(boxes) and not unclosed and bool(text[boxes[-1].inside : boxes[-1].stop].strip())


@dataclass(frozen=True)
class ThinkFormat:
    """1.0 for one thought in `<think>...</think>` followed by an answer, else 0.0.

    The format reward of DeepSeek-R1 (https://arxiv.org/abs/2501.12948, section 2.2.2). Where the chat template already
    wrote `<think>`, the completion starts inside the thought: a completion whose first tag is `</think>` counts as such
    (`prefilled=None`), unless `prefilled` says that it must be so (True) or must not (False).

    >>> ThinkFormat()(["<think>a</think>b", "a</think>b", "a b", "<think>a</think>", "<think>a<think>b</think>c"])
    [1.0, 1.0, 0.0, 0.0, 0.0]
    """

    prefilled: bool | None = None
    __name__ = "think_format_reward"

    def __call__(self, completions: list, prompts: list | None = None, **kwargs) -> list[float]:
        opened = prefilled_thoughts(len(completions), prompts, self.prefilled)
        texts = [completion_text(completion) for completion in completions]
        return [float(self._is_formed(text, thought)) for text, thought in zip(texts, opened, strict=True)]

    def _is_formed(self, text: str, opened: bool) -> bool:
        thought, closed, answer = text.partition(THINK_CLOSE)
        starts = thought.lstrip().startswith(THINK_OPEN)
        thought = thought.lstrip().removeprefix(THINK_OPEN) if starts else thought
        in_place = starts != opened or (self.prefilled is None and not opened)
        once = THINK_OPEN not in thought + answer and THINK_CLOSE not in answer
        return bool(closed) and in_place and once and bool(answer.strip())


@dataclass(frozen=True)
class TagCount:
    r"""A quarter for each of `<think>`, `</think>`, `<answer>`, `</answer>` that occurs exactly once.

    The tag count reward of Open-R1 (https://github.com/huggingface/open-r1), a gentler slope than all or nothing. The
    opening `<think>` counts as written when the chat template wrote it.

    >>> TagCount()(["<think>\na\n</think>\n<answer>\nb\n</answer>", "<think>\na\n</think>\nb"])
    [1.0, 0.5]
    """

    tags: tuple[str, ...] = (THINK_OPEN, THINK_CLOSE, "<answer>", "</answer>")
    prefilled: bool | None = None
    __name__ = "tag_count_reward"

    def __call__(self, completions: list, prompts: list | None = None, **kwargs) -> list[float]:
        opened = prefilled_thoughts(len(completions), prompts, self.prefilled)
        texts = [THINK_OPEN * thought + completion_text(c) for c, thought in zip(completions, opened, strict=True)]
        return [sum(text.count(tag) == 1 for tag in self.tags) / len(self.tags) for text in texts]


# Letters by which a language is recognised. Languages with one script count as one, because what reinforcement learning
# produces is a change of script, from English to Chinese above all.
_SCRIPTS = {
    "latin": "A-Za-z\u00c0-\u024f",
    "han": "\u3400-\u4dbf\u4e00-\u9fff",
    "cyrillic": "\u0400-\u04ff",
    "arabic": "\u0600-\u06ff",
    "devanagari": "\u0900-\u097f",
    "kana": "\u3040-\u30ff",
    "hangul": "\uac00-\ud7af",
    "thai": "\u0e00-\u0e7f",
    "hebrew": "\u0590-\u05ff",
}
_LANGUAGES = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "vi", "id", "sv"), ("latin",)),
    **dict.fromkeys(("ru", "uk", "bg"), ("cyrillic",)),
    "zh": ("han",),
    "ja": ("kana", "han"),
    "ko": ("hangul",),
    "ar": ("arabic",),
    "fa": ("arabic",),
    "hi": ("devanagari",),
    "th": ("thai",),
    "he": ("hebrew",),
}
_WORD_SCRIPTS = [name for name in _SCRIPTS if name not in ("han", "kana", "thai")]
# A word of an alphabet, or one sign of a script that is written without spaces.
_UNIT = re.compile(
    "|".join(f"(?P<{name}>[{chars}]{'+' * (name in _WORD_SCRIPTS)})" for name, chars in _SCRIPTS.items())
)
# Bounded, because this runs in the trainer: 20,000 opened formulas must not each be searched to the end.
_FORMULA = re.compile(r"\$[^$]{0,2000}\$|\\\([^\n]{0,500}?\\\)|\\\[[^\]]{0,1000}\\\]|\\[a-zA-Z]+|</?[a-z]+>")


@dataclass(frozen=True)
class LanguageConsistency:
    r"""The share of the completion's words that are in the language asked for.

    The language consistency reward of DeepSeek-R1 (https://arxiv.org/abs/2501.12948, section 2.3.2), by script. A
    dataset column `language` overrides `language` row by row. Formulas, commands and tags do not count, and a text
    without any word is consistent.

    >>> LanguageConsistency()(["The sum is $x$.", "The sum 是 对 的"])
    [1.0, 0.4]
    """

    language: str = "en"
    __name__ = "language_consistency_reward"

    def __post_init__(self):
        _scripts_of(self.language)

    def __call__(self, completions: list, language: list[str] | None = None, **kwargs) -> list[float]:
        wanted = language if language is not None else [self.language] * len(completions)
        return [_share_in(_scripts_of(name), completion_text(c)) for c, name in zip(completions, wanted, strict=True)]


def _scripts_of(language: str) -> tuple[str, ...]:
    if language not in _LANGUAGES:
        raise ValueError(f"language={language!r} is not known. Set it to one of {', '.join(sorted(_LANGUAGES))}.")
    return _LANGUAGES[language]


def _share_in(scripts: tuple[str, ...], text: str) -> float:
    units = [match.lastgroup for match in _UNIT.finditer(_FORMULA.sub(" ", text))]
    return sum(unit in scripts for unit in units) / len(units) if units else 1.0
