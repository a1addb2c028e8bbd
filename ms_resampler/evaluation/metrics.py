"""The benchmarks' metrics, written from their definitions: each takes a reply and the truth.

Oddities of a benchmark's own script that change scores are kept, and noted here.
"""

import re
from collections.abc import Mapping, Sequence

# VQA ---------------------------------------------------------------------------------------------------------------

# Apostrophes are put back into these words. For "x'y'z" that is done for "xy'z" and "x'yz", but not for "xyz".
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # the official script passes a flag of this value where re.sub takes a count


def vqa_punctuation(text: str) -> str:
    """Punctuation as VQA's evaluation treats it.

    A mark is removed if it is next to a space anywhere in the text, or if the text has a number with a comma; otherwise
    it becomes a space. A period is removed unless a digit follows.
    """
    without = text
    for mark in PUNCTUATION:
        drops = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text)
        without = without.replace(mark, "" if drops else " ")
    return _PERIOD.sub("", without, count=_PERIODS)


def vqa_words(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes put back."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_normalise(text: str) -> str:
    """An answer as VQA's evaluation compares it."""
    return vqa_words(vqa_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def evalai_normalise(text: str) -> str:
    """EvalAI's normalisation of an answer, as TextVQA uses it and LLaVA for its submissions to VQAv2 and VizWiz."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_normalise(text)


def leave_one_out(answer: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, agreeing others / 3)."""
    agreeing = answers.count(answer)
    return sum(min(1.0, (agreeing - (other == answer)) / 3) for other in answers) / len(answers)


def vqa_accuracy(reply: str, answers: Sequence[str]) -> float:
    """VQA accuracy; not normalised where all annotators agree, as in the official script."""
    answers = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    reply = reply.replace("\n", " ").replace("\t", " ").strip()
    if len(set(answers)) > 1:
        answers, reply = [vqa_normalise(answer) for answer in answers], vqa_normalise(reply)
    return leave_one_out(reply, answers)


def textvqa_accuracy(reply: str, answers: Sequence[str]) -> float:
    """The same, with TextVQA's normalisation on both sides."""
    return leave_one_out(evalai_normalise(reply), [evalai_normalise(answer) for answer in answers])


def gqa_normalise(reply: str) -> str:
    """A reply in the form that LLaVA submits for GQA's exact match."""
    return reply.rstrip(".").lower()


# Yes and no --------------------------------------------------------------------------------------------------------


def mme_answer(reply: str) -> str | None:
    """The word yes or no among the reply's first four characters, yes first; None if there is neither."""
    start = reply.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), None)


def pope_answer(reply: str) -> str:
    """No if the first sentence has the word no or not, else yes."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def first_yes_or_no(reply: str) -> str | None:
    """The first word of a reply that is yes or no."""
    found = re.search(r"\b(yes|no)\b", reply.lower())
    return found[1] if found else None


# Multiple choice ---------------------------------------------------------------------------------------------------


def scienceqa_letter(reply: str, count: int) -> str | None:
    """The letter of "B", "B. ..." or "The answer is B": LLaVA's rules, for `count` options."""
    reply = reply.replace("\n", ". ")
    found = re.fullmatch(r"\s*([A-E])\s*", reply) or re.match(r"([A-E])\. ", reply)
    found = found or re.search(r"The answer is ([A-E])\.", reply) or re.search(r"The answer is ([A-E])", reply)
    return found[1] if found and found[1] in "ABCDE"[:count] else None


def mmbench_letter(reply: str, options: Mapping[str, str]) -> str | None:
    """The only option that a reply names, by its letter as a separate word, else by its text; "Z" for a refusal.

    None if there is no such option: the official evaluation then asks a language model.
    """
    refusals = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
                "I'm sorry, but without the image provided", "Cannot determine the answer")  # fmt: skip
    if any(refusal in reply for refusal in refusals):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    lowered = reply.lower()
    if len(lowered) > 2 * sum(len(option) for option in options.values()):
        return None
    named = [letter for letter, option in options.items() if option.lower() in lowered]
    return named[0] if len(named) == 1 else None


def ai2d_letter(reply: str) -> str | None:
    """The letter of "B", "b." or "B. ...", as lmms-eval takes it."""
    found = re.match(r"\s*([A-Z])\.", reply) or re.fullmatch(r"\W*([A-Za-z])\W*", reply)
    return found[1].upper() if found else None


def mmmu_letter(reply: str, options: Sequence[str]) -> str | None:
    """The last option that a reply names: as "(B)", "B " or "B.", or, in a longer reply, by its text.

    None where MMMU's script draws a letter at random.
    """
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    letters = [chr(65 + index) for index in range(len(options))]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if named := [letter for letter in letters if form.format(letter) in reply]:
            # A letter found only within a word has position -1, and loses.
            return max(named, key=lambda letter: reply.rfind(place.format(letter)))
    lowered = reply.lower()
    named = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in lowered]
    if len(reply.split()) <= 5 or not named:
        return None
    return max(named, key=lambda letter: lowered.rfind(options[ord(letter) - 65].lower()))


def mmmu_normalise(text: str) -> list[str | float]:
    """A number, rounded to two decimals, or lower-case text; a single letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MMMU_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_open_answers(reply: str) -> list[str | float]:
    """Candidate answers of an open reply: the end of each sentence, and its numbers."""
    reply = reply.strip().strip(".").lower()
    sentences = re.split(r"\.\s(?=[A-Z])|\n", reply)
    ends = []
    for number, sentence in enumerate(sentences, start=1):
        indicators = [*_INDICATORS, "="] if number == len(sentences) else _INDICATORS
        tails = [sentence.split(indicator)[-1].strip() for indicator in indicators if indicator in sentence]
        shortest = ""
        for tail in tails:  # an empty end is replaced by the next one, as in the official script
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in list(":,.!?;'"):
            ends.append(shortest)
    ends = ends or [reply]
    numbers = [number for end in ends for pattern in _MMMU_NUMBERS for number in re.findall(pattern, end)]
    return [answer for text in [*ends, *numbers] for answer in mmmu_normalise(text)]


def mmmu_open_match(reply: str, truths: Sequence[str]) -> bool:
    """Whether an open reply has a number that equals the truth, or text that contains it."""
    wanted = [answer for truth in truths for answer in mmmu_normalise(truth)]
    return any(
        any(isinstance(truth, str) and truth in answer for truth in wanted)
        if isinstance(answer, str)
        else answer in wanted
        for answer in mmmu_open_answers(reply)
    )


# Documents and charts ----------------------------------------------------------------------------------------------


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def anls(reply: str, answers: Sequence[str]) -> float:
    """1 - edit distance / length for the nearest answer, and 0 below 0.5; case and runs of spaces do not matter.

    The length is measured before spaces are joined, as in the official script.
    """

    def distance(answer: str) -> float:
        texts = (" ".join(text.strip().lower().split()) for text in (reply, answer))
        return edit_distance(*texts) / max(len(reply), len(answer), 1)

    similarity = 1 - min(map(distance, answers))
    return similarity if similarity >= 0.5 else 0.0


def relaxed_match(reply: str, truth: str, tolerance: float = 0.05) -> bool:
    """Numbers within 5% of the truth (a % sign divides by 100), other text equal but for case."""
    number, wanted = plain_number(reply), plain_number(truth)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= tolerance
    return reply.lower() == truth.lower()


def plain_number(text: str) -> float | None:
    """The number that a text is, if it is one."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def only_number(reply: str) -> float | None:
    """The one number in a reply, digits or a number word; None if there are none or several."""
    words = [NUMBERS.get(word, word) for word in re.sub(r"(?<=\d),(?=\d{3})", "", reply.lower()).split()]
    numbers = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", " ".join(words))}
    return numbers.pop() if len(numbers) == 1 else None


def ocrbench_match(reply: str, answers: Sequence[str], dataset: str) -> bool:
    """Whether a reply contains an answer, ignoring case or, for formulae (HME100k), spaces."""

    def prepared(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if dataset == "HME100k" else text.lower()

    return any(prepared(answer) in prepared(reply) for answer in answers)
