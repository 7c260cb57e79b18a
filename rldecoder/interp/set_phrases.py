"""A phrase for a set of words by MiniLM, where no class or affix covers the set.

MiniLM writes nothing: it compares words. Each phrase below has words that it covers; a set gets the
phrase to which its words are nearest, each by itself and all together, if they are near enough.
Nothing tests a phrase but the tests of this module; the set, which was tested, stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rldecoder.interp.label_embedding import label_vectors

FloatArray = NDArray[np.float64]
MIN_WORDS = 4
"""Words of a set, at least."""
SHARE = 0.6
"""Of a set's words, those that are nearest to its phrase, at least."""
COSINE = 0.6
"""Between the means of a set's words and of its phrase's, at least."""
PHRASES = {
    "colours": "red blue green yellow black white brown grey purple orange",
    "months": "January February March April June July August October November December",
    "days of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday weekday",
    "seasons and times of day": "spring summer autumn winter morning evening night noon dawn",
    "numbers in words": "two three four five six seven eight nine ten twelve twenty hundred",
    "places in an order": "first second third fourth fifth last next final previous",
    "spans of time": "second minute hour day week month year decade century moment",
    "words of time": "now then soon already yet still later before afterwards recently",
    "how often": "always never often sometimes usually rarely seldom frequently occasionally",
    "how much": "very quite rather too extremely fairly slightly almost nearly completely",
    "how many": "all many some several few most any each every both much none",
    "family": "mother father sister brother son daughter uncle aunt cousin grandmother",
    "people": "man woman boy girl child person lady gentleman baby fellow",
    "first names": "John Mary James Elizabeth William Anna Robert Sarah Thomas Alice",
    "titles of people": "Mr Mrs Miss Sir Lady Doctor Professor Captain Lord Reverend",
    "personal pronouns": "I you he she it we they him her them us me",
    "possessive pronouns": "my your his her its our their mine yours",
    "question words": "who what when where why how which whose whom",
    "prepositions": "in on at from with into over under between through about against",
    "conjunctions": "and but or because although though while unless whereas since",
    "modal verbs": "will would can could shall should may might must cannot",
    "forms of to be and to have": "is are was were be been being am has have had",
    "negation": "not no never none nothing neither nor without cannot nobody",
    "verbs of saying": "said asked replied told answered whispered cried shouted explained",
    "verbs of thinking": "think know believe understand remember imagine suppose consider guess",
    "verbs of feeling": "love hate like enjoy fear want wish hope prefer admire",
    "verbs of moving": "go come walk run move travel leave arrive climb jump ride",
    "verbs of making": "make build create produce construct form generate design manufacture",
    "verbs of giving and taking": "give take get receive send bring carry offer put hand",
    "verbs of seeing": "see look watch notice observe stare gaze glance view perceive",
    "verbs of changing": "change increase reduce grow convert modify replace update improve",
    "parts of the body": "head hand arm leg foot eye face heart back finger mouth",
    "animals": "dog cat horse bird fish cow sheep lion mouse wolf elephant",
    "plants": "tree flower grass leaf rose bush forest root seed oak",
    "food": "bread meat cheese fruit rice soup egg vegetable apple cake meal",
    "drinks": "water tea coffee wine beer milk juice whisky brandy",
    "clothes": "shirt coat hat dress shoe trousers jacket glove skirt boot",
    "parts of a house": "door window room wall floor kitchen roof stairs bedroom ceiling",
    "furniture": "table chair bed sofa desk shelf cupboard lamp bench drawer",
    "buildings": "house church school hospital castle tower shop hotel station palace",
    "vehicles": "car train ship boat bicycle bus truck aeroplane carriage wagon",
    "land and water": "river mountain sea lake island hill valley coast desert ocean",
    "weather": "rain snow wind storm cloud sun fog thunder frost heat",
    "materials": "iron wood gold stone glass silver steel paper cotton leather",
    "countries": "France Germany England China Japan India Italy Spain Russia Brazil",
    "peoples and languages": "French German English Chinese Japanese Italian Spanish Russian",
    "cities": "London Paris Berlin Rome Moscow Tokyo Chicago Madrid Vienna Boston",
    "directions": "north south east west left right up down above below",
    "sizes": "big small large little huge tiny tall short long wide narrow",
    "praise": "good great excellent wonderful fine splendid beautiful perfect superb",
    "blame": "bad terrible awful evil poor horrible wicked wrong ugly dreadful",
    "moods": "happy sad angry afraid glad proud tired anxious jealous calm",
    "religion": "God church prayer priest faith Bible bishop holy saint temple",
    "war": "war army soldier battle enemy weapon military troops attack general",
    "government": "president king minister parliament government election law senate vote",
    "law and crime": "court judge crime police prison lawyer murder guilty trial thief",
    "money and trade": "money price cost market bank trade tax pay dollar profit",
    "work": "job worker employer factory labour business office company staff manager",
    "school": "school teacher student university lesson class college exam pupil study",
    "illness": "disease doctor fever pain infection patient cancer virus symptom wound",
    "music": "music song piano singer violin band concert melody opera dance",
    "sports": "football game team player match tennis race goal coach baseball",
    "books and writing": "book story novel author poem page chapter letter writer reader",
    "sciences": "physics chemistry biology mathematics astronomy geology science psychology",
    "mathematics": "sum product matrix vector equation integer square root function",
    "units of measure": "metre mile inch kilogram pound gallon litre ton foot degree",
    "files and folders": "file folder directory path filename disk document archive",
    "computers": "computer memory processor keyboard screen software hardware server laptop",
    "the internet": "website internet browser email network online URL link download server",
    "types of values": "string integer float boolean list tuple dict array bytes object",
    "parts of programs": "function class method module variable argument parameter attribute",
    "errors in programs": "error exception failure warning bug crash traceback fault invalid",
    "keywords of programs": "return import def lambda elif except yield async await assert",
}


def name_words(sets: Sequence[Sequence[str]]) -> list[str | None]:
    """The phrase of each set of tokens' texts; None where none is near enough.

    Raises:
        BadInputError, DamagedFileError: see `label_embedding.installed_folder`.
    """
    words = [_words(texts) for texts in sets]
    covered = [_words(listed.split()) for listed in PHRASES.values()]
    known = sorted({word for group in (*words, *covered) for word in group})
    vector = dict(zip(known, label_vectors(known), strict=True))
    prototypes = np.stack([_mean([vector[word] for word in group]) for group in covered])
    return [
        _nearest(np.stack([vector[word] for word in group]), prototypes)
        if len(group) >= max(MIN_WORDS, SHARE * len(texts))
        else None
        for group, texts in zip(words, sets, strict=True)
    ]


def _nearest(vectors: FloatArray, prototypes: FloatArray) -> str | None:
    together = prototypes @ _mean(vectors)
    best = int(together.argmax())
    share = float(((vectors @ prototypes.T).argmax(1) == best).mean())
    if together[best] < COSINE or share < SHARE:
        return None
    return list(PHRASES)[best]


def _mean(vectors: Sequence[FloatArray] | FloatArray) -> FloatArray:
    mean: FloatArray = np.mean(vectors, axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def _words(texts: Sequence[str]) -> list[str]:
    """Those that are words, each once; MiniLM knows no case."""
    lowered = (text.strip().lower() for text in texts)
    return list(dict.fromkeys(text for text in lowered if text.isalpha() and len(text) > 1))
