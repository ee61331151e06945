"""A paragraph of prose -> its sentences, by a few rules and short lists of words.

    split_sentences("It rained. We left.") -> ["It rained.", "We left."]
"""

import re

# A stop is . ! ? or a run of them; it may stand apart, as in tokenized text. Quotes, brackets,
# emphasis and marks of notes close after it. Then a space, quotes and the like, and the next word.
# The stops of some scripts end a sentence alone: no abbreviation has them.
QUOTES = "\"'“„‘’«»*_`~"                 # each opens in one language and closes in another
OPENING = QUOTES + "([¿¡—–-"
STOP = re.compile(
    rf"""(?<![.!?…])(?<![.!?…]\s)((?:\s?[.!?…])+) [{QUOTES}”)\]]*
         (?:\[[\w\s,–-]{{1,20}}\]|[¹²³⁰-⁹†‡])* ((?<=[^\W\d][.!?…])\d{{1,3}})?
         \s(?=[{re.escape(OPENING)}]*\s?(\w+))
         | [。！？｡।॥۔؟։።]++(?![」』”’）)])\s?(?=\S)""", re.VERBOSE)
TITLES = set("""mr mrs ms dr prof sra srta messrs mme mlle rev hon gen col maj capt lt sgt gov sen
    rep pres fr mt vs cf viz e.g i.e eg ie approx ca adj adv vi vt syn esp""".split())  # never last
NUMBERED = set("no nos vol vols p pp fig figs ch sec art ed al".split())    # not before a number
CLOSERS = set("""etc jr sr esq inc ltd co corp bros dept est ave blvd rd st jan feb mar apr jun jul
    aug sept sep oct nov dec a.m p.m ph.d m.d b.a m.a b.c a.d""".split())   # last before a STARTER
STARTERS = set("""the a an this that these those he she it we they you i his her its our their my
    your there here but and or so yet for in on at by as if when while where what who why how then
    now after before once not no yes""".split())
ORDINAL = set("""der die das den dem des am im zum zur vom beim bis seit ein eine einen einem einer
    mein meine dein sein ihr ihre unser jeder jede""".split())      # German: "am 3. Mai"
ROMAN = re.compile("(?=.)x{0,3}(ix|iv|v?i{0,3})")


def split_sentences(text):
    """A paragraph of prose -> its sentences, white space normalized; by rules.
    'Mr. J. R. Fox paid 3.14 dollars. "Why?" he said. (He left.) Yes!' ->
    ['Mr. J. R. Fox paid 3.14 dollars.', '"Why?" he said.', '(He left.)', 'Yes!']"""
    text = " ".join(text.split())
    sentences, start, lowered = [], 0, text.islower()
    for match in STOP.finditer(text):
        if _ends_sentence(text, start, match, lowered):
            sentences.append(text[start:match.end()].rstrip())
            start = match.end()
    return sentences + [text[start:]] if text[start:] else sentences


def _ends_sentence(text, start, match, lowered):
    """Does the sentence that begins at start end with this STOP? lowered: the text has capitals
    nowhere, so that none can open the next sentence."""
    stop, note, following = match.groups()
    if stop is None:
        return True                                             # of another script
    if following[0].islower() and not (lowered and stop[0] == " " and len(stop) == 2):
        return False
    if stop.strip() != ".":
        return True
    # A few characters hold the last two words, their inner stops too: u.s, e.g.
    *_, before, word = ["", "", *text[max(start, match.start() - 99):match.start()].split()]
    before, word = before.lstrip(OPENING).lower(), word.lstrip(OPENING).lower()
    number = word.isdigit() or ROMAN.fullmatch(word)
    if word in TITLES or (word in NUMBERED and (note or following[0].isdigit())):
        return False                                            # "Dr. Fox", "No. 5", "p.5"
    if number and (not before or before in ORDINAL and len(word) < 3
                   and following.lower() not in STARTERS):      # "I am 5. You are 6."
        return False                                            # "1. The lid.", "am 3. Mai"
    initials = all(len(part) == 1 and part.isalpha() for part in word.split("."))   # j, u.s
    return following.lower() in STARTERS if initials or word in CLOSERS else True
