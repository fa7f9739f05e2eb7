"""The filter of prompts that mention minors: it errs on the side of yes, and nothing turns it off."""

from __future__ import annotations

import re
import unicodedata


def mentions_minors(text: str) -> bool:
    """Whether `text` mentions children, teenagers or an age under 18. Errs on the side of yes."""
    return _MINORS.search(_plain(text)) is not None


def _plain(text: str) -> str:
    """Lower case, full-width and accented letters made plain, dashes and spaces unified, invisible marks removed."""
    text = unicodedata.normalize("NFKD", _INVISIBLE.sub("", text)).casefold()
    text = "".join(letter for letter in text if not unicodedata.combining(letter))
    text = re.sub("[\u2010-\u2015\u2212_]", "-", text).replace("\u2019", "'")
    return re.sub(r"\s+", " ", text.replace("_", " "))


_AGE = (
    r"(?:0?[0-9]|1[0-7]|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|"
    r"sixteen|seventeen)"
)
_YEARS = r"(?:years?|yrs?|months?|weeks?|days?)"
_TERMS = (
    r"child(?:ren)?(?:'?s)?|child(?:like|ish|hood)|schoolchild(?:ren)?|grandchild(?:ren)?|kid(?:s|do|dos|die|dies|dy)?|"
    r"bab(?:y|ies|e in arms)|newborns?|infants?|infantile|toddlers?|tots?|minors?|under-?aged?|"
    r"boys?|girls?|(?:school|little|young) ?(?:boys?|girls?)|schoolgirls?|schoolboys?|lads?|lass(?:es|ie)?|"
    r"pre-?teens?|tweens?|teens?|teen-?age(?:d|rs?)?|adolescen(?:t|ts|ce)|pubescents?|juveniles?|youths?|youngsters?|"
    r"pre-?schoolers?|preschool|kindergart(?:en|ens|eners?|ners?)|nursery|"
    r"(?:primary|elementary|middle|junior high|high|grade) ?school(?:ers?)?|"
    r"(?:first|second|third|fourth|fifth|sixth|seventh|eighth|[1-9]th|1st|2nd|3rd) ?graders?|"
    r"loli(?:s|ta|tas|con)?|shota(?:s|con)?|jail ?bait|barely legal|foet(?:us|uses)|fetus(?:es)?"
)
_AGES = (
    rf"{_AGE}[ -]*{_YEARS}[ -]*(?:olds?|of age|young)|{_AGE}[ -]*(?:yo|y/o|y\.o\.?|yrs? ?old)|"
    rf"(?:aged?|age of|age is|ages)[ :]*{_AGE}|(?:under|below|younger than|less than)[ -]*(?:the age of )?"
    r"(?:1[0-8]|[1-9]|eighteen)(?: years?)?"
    r"(?! ?(?:minutes?|hours?|dollars?|euros?|degrees?|metres?|meters?|percent|%|km|kg|cm))"
)
_MINORS = re.compile(rf"(?<![a-z0-9])(?:{_TERMS}|{_AGES})(?![a-z0-9])")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
