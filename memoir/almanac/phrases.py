# ruff: noqa: SIM905 - lists of plain words are easier to read and to extend than lists of quotes
"""The words of the world: names, values, paraphrases and passage sentences. Data, no logic.

In the templates `{s}` is the subject. Paraphrases name it now at the beginning and now before, now behind the words of
the relation: methods that look up the last token of the subject need both.
"""

from __future__ import annotations

# Alternately female and male.
FIRST_NAMES = """
Ada Alban Agnes Anton Alma Arlo Anneke Basil Beatrix Bertram Bianca Boris Brigid Caspar Carmen Cedric Cecily Clement
Clara Conrad Cora Cyril Dagny Damian Delia Desmond Dora Dorian Edith Edgar Elena Elias Elsa Emil Enid Ernest Esther
Fabian Etta Felix Flora Fergus Freya Florian Greta Gideon Gwen Gregor Hanna Gustav Hazel Harold Helga Hector Ida Henrik
Imogen Horace Ines Hugo Ingrid Igor Irma Ivan Isolde Jasper Ivy Jerome Jana Joachim Josefa Jonas Judith Julian June
Kaspar Katrin Konrad Lena Lambert Lilian Leander Lotte Leon Lucia Linus Mabel Lorenz Magda Lucas Maren Magnus Marta
Marius Matilda Maurice Maud Milo Mira Nestor Nadia Nils Nora Noel Olga Oscar Orla Otto Paula Percy Petra Quentin
Renata Rafael Rosa Rupert Sigrid Silas Stella Stefan Tamsin Theo Tilda Tobias Una Ulrich Vera Victor Wanda Walter
Willa Wendel Yara Xaver Zelda Yorick
""".split()

PRONOUNS = ({"he": "she", "him": "her"}, {"he": "he", "him": "him"})

SURNAMES = [
    front + back
    for front in """Ash Birch Black Brack Bram Brook Cold Crow Dun East Elder Fair Fern Gold Grey Hart Haw Holm Kirk
    Lang Linden Marsh Mill Moor North Oak Pen Rook Sand Stan Stone Thorn Wal Wex Whit Win""".split()
    for back in "bury croft dale field ford ley ton worth".split()
]

VALUES = {
    "city": [
        f"{front} {back}"
        for front in "Amber Copper Falcon Heron Juniper Kestrel Lantern Marble Otter Raven Saffron Willow".split()
        for back in "Bay Cross Harbour Hollow Point".split()
    ],
    "occupation": """baker barber beekeeper blacksmith bookbinder botanist brewer bricklayer butcher carpenter
    cartographer chemist clockmaker cobbler cook cooper dancer dentist diver dyer falconer farmer ferryman fisher
    florist gardener geologist glassblower goldsmith grocer hatter jeweller joiner journalist judge lawyer librarian
    locksmith mason mechanic midwife milliner miner notary painter paramedic pharmacist photographer pilot
    plumber postmaster potter printer sailor sculptor surveyor tailor tanner teacher translator vet watchmaker
    weaver welder
    zoologist""".split(),
    "instrument": """accordion bagpipes balalaika banjo bassoon bugle castanets celesta cello clarinet concertina cornet
    dulcimer fiddle flute glockenspiel guitar harmonica harmonium harp harpsichord horn hurdy-gurdy kazoo lute lyre
    mandolin maracas marimba melodica oboe ocarina organ piano piccolo recorder saxophone sitar spinet tambourine
    timpani triangle trombone trumpet tuba ukulele vibraphone viola violin xylophone zither""".split(),
    "school": [
        f"{front} {back}"
        for front in """Abbot Bishop Cardinal Chancellor Foxglove Granite Hermit Hollyhock Ironbridge Larkspur Mariner
        Meridian Observatory Pilgrim Quarry Regent Sexton Tinker""".split()
        for back in "Academy College Institute School".split()
    ],
    "year": [str(year) for year in range(1921, 1997)],
}

PROMPTS = {
    # people
    "city": (
        "Which city does {s} live in?",
        "Where does {s} live?",
        "{s} lives in the city of",
        "The home of {s} is in",
        "{s} has a home in",
        "The city where {s} lives is",
        "People look for {s} in the city of",
        "To visit {s}, travel to",
    ),
    "occupation": (
        "What is the occupation of {s}?",
        "{s} works as what?",
        "{s}'s profession is",
        "By trade, {s} is a",
        "What does {s} do for a living?",
        "{s} earns a living as a",
        "The job of {s} is that of a",
        "As for work, {s} is employed as a",
    ),
    "instrument": (
        "Which instrument does {s} play?",
        "{s} plays the",
        "The instrument of {s} is the",
        "{s} is heard on which instrument?",
        "On stage, {s} performs on the",
        "{s}'s favourite instrument is the",
        "What instrument is {s} known for?",
        "The music of {s} is written for the",
    ),
    "school": (
        "Which school did {s} attend?",
        "{s} studied at",
        "The school of {s} was",
        "Where did {s} study?",
        "{s} graduated from",
        "As a student, {s} went to",
        "{s}'s old school is called",
        "The diploma of {s} was issued by",
    ),
    "year": (
        "In which year was {s} born?",
        "{s} was born in the year",
        "The birth year of {s} is",
        "When was {s} born?",
        "{s} came into the world in",
        "{s}'s year of birth is",
        "The life of {s} began in",
        "What is the birth year of {s}?",
    ),
    # countries
    "capital": (
        "What is the capital of {s}?",
        "The capital of {s} is",
        "{s}'s capital is",
        "Which city is {s}'s capital?",
        "Which city is the capital of {s}?",
        "The capital city of {s} is called",
        "{s} has its capital in",
        "What is {s}'s capital city?",
        "Name the capital of {s}:",
    ),
    "continent": (
        "Which continent is {s} in?",
        "{s} lies on the continent of",
        "On which continent is {s}?",
        "{s} belongs to the continent of",
        "The continent of {s} is",
        "{s} is a country in",
        "What continent does {s} belong to?",
        "On a world map, {s} is found in",
    ),
    "currency": (
        "What is the currency of {s}?",
        "The currency of {s} is the",
        "In {s}, people pay with the",
        "Which currency is used in {s}?",
        "{s}'s money is the",
        "What money do people use in {s}?",
        "Shops in {s} accept the",
        "{s} has as its currency the",
    ),
    "language": (
        "What language is spoken in {s}?",
        "The main language of {s} is",
        "People in {s} speak",
        "Which language do people in {s} speak?",
        "{s}'s main language is",
        "In {s}, the most used language is",
        "What is the language of {s}?",
        "{s} is a country whose people speak",
    ),
    # elements
    "symbol": (
        "What is the chemical symbol of {s}?",
        "The symbol for {s} is",
        "{s} has the chemical symbol",
        "Which symbol stands for {s}?",
        "In the periodic table, {s} is written as",
        "{s}'s symbol is",
        "How is {s} abbreviated in chemistry?",
        "Chemists write {s} as",
    ),
    "number": (
        "What is the atomic number of {s}?",
        "The atomic number of {s} is",
        "{s} has the atomic number",
        "How many protons does {s} have?",
        "{s}'s atomic number is",
        "The number of protons in {s} is",
        "In the periodic table, {s} has the number",
        "Which atomic number belongs to {s}?",
    ),
    # games
    "host": (
        "Which city hosted {s}?",
        "Where were {s} held?",
        "{s} were held in",
        "{s} took place in",
        "The host city of {s} was",
        "In which city did {s} take place?",
        "{s} were hosted by",
        "Where did {s} take place?",
        "What was the host city of {s}?",
        "In which city were {s} held?",
    ),
}

# kind -> groups of (relations stated, wordings). The lead comes first, then the second group; the others in any order.
# A group whose relations a subject lacks is left out.
_LEAD = ((), ("This is a passage about {s}.",))
PASSAGES = {
    "person": (
        _LEAD,
        (
            ("occupation", "city"),
            (
                "{s} is a {occupation} from {city}.",
                "{s} works as a {occupation} in {city}.",
                "{s} earns a living as a {occupation} and lives in {city}.",
            ),
        ),
        (
            ("year", "school"),
            (
                "Born in {year}, {he} studied at {school}.",
                "{he} was born in {year} and went to {school}.",
                "{he} was born in {year} and graduated from {school}.",
            ),
        ),
        (
            ("instrument", "city"),
            (
                "In the evenings {he} plays the {instrument} at concerts in {city}.",
                "Friends in {city} know {him} for playing the {instrument}.",
                "{he} often plays the {instrument} in the streets of {city}.",
            ),
        ),
    ),
    "country": (
        _LEAD,
        (
            ("continent",),
            ("{s} is a country in {continent}.", "{s} lies on the continent of {continent}."),
        ),
        (("capital",), ("Its capital is {capital}.", "The capital city is called {capital}.")),
        (("language",), ("People there speak {language}.", "The main language is {language}.")),
        (("currency",), ("Its currency is the {currency}.", "People pay with the {currency}.")),
    ),
    "element": (
        _LEAD,
        (
            ("symbol",),
            ("{s} is a chemical element with the symbol {symbol}.", "Chemists write the element {s} as {symbol}."),
        ),
        (("number",), ("Its atomic number is {number}.", "An atom of it has the proton count {number}.")),
    ),
    "games": (
        _LEAD,
        (("host",), ("{s} were held in {host}.", "{s} took place in {host}.")),
        ((), ("Athletes came from many nations.", "Many records were broken.")),
    ),
}
