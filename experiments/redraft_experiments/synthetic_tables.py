"""Word lists and templates of the synthetic corpus (see `synthetic.py`).

Template language: `[a|b|c]` is one of the wordings at random (nesting allowed), `{slot}` is a value
drawn from the lists. Sentences start in lower case when their first word is no name and carry no
full stop where `synthetic.py` puts them together.
"""

from __future__ import annotations

from dataclasses import dataclass

Words = tuple[str, ...]


def _words(text: str) -> Words:
    return tuple(text.split())


def _lines(text: str) -> Words:
    return tuple(line.strip() for line in text.strip().splitlines())


# ---------------------------------------------------------------------------------- word lists

GIRLS = _words(
    "Anna Beth Clara Dora Ella Fay Gina Hana Iris Jane Kate Lily Mia Nora Olga Pam Rosa Sara Tina "
    "Uma Vera Wendy Zoe Alice Ruth Maya Lena Ivy Amy Eve Joan Leah Nell Tess June Carla Edith Sofia"
)
BOYS = _words(
    "Adam Ben Carl Dan Eric Finn Gus Hugo Ivan Jack Ken Leo Max Ned Omar Paul Ravi Sam Tom Victor "
    "Will Zack Hank Mark Noah Otto Pete Rob Seth Toby Alan Dean Fred Glen Jon Luke Neil Theo"
)
PEOPLE = GIRLS + BOYS
SURNAMES = _words(
    "Adams Baker Clark Davis Evans Ford Gray Hill Irwin Jones King Lane Moore Nash Owen Park Quinn "
    "Reed Stone Todd Vance Wood Young Burns Cole Drake Flynn Grant Hale Kemp Lowe Marsh Price Shaw"
)
CITIES = _words(
    "Leeds Oxford York Paris Rome Oslo Lima Cairo Delhi Tokyo Boston Denver Austin Dallas Miami "
    "Turin Lyon Porto Bern Graz Bath Derby Dover Exeter Perth Hull Luton Truro Ripon Salem Reno "
    "Tampa Omaha Tulsa Quito Accra Dakar Tunis Split Riga Turku Malmo Bergen Cork Galway Sligo"
)
COLORS = _words("red blue green black white grey brown pink gold silver orange purple yellow")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
HOURS = tuple(f"{hour}:{minute}" for hour in range(1, 13) for minute in ("00", "15", "30", "45"))
FRONTS = _words(
    "Blue Red Green Old New Little Golden Silver Quiet Sunny Happy Royal Crystal Copper Misty Wild "
    "Brave Lucky Salty Sweet Hidden Corner Upper River Stone Velvet Winter Summer Garden Harbor"
)
BACKS = _words(
    "Lamp Table Fork Oak Bell Anchor Lion Swan Kettle Mill Gate Tower Bridge Lantern Spoon Rose "
    "Barrel Boat Star Moon Fox Owl Crown Wheel Orchard Stove Candle Feather Window Basket"
)
FOODS = _words("Thai Greek Indian Italian Mexican French Korean Spanish Turkish Polish Cuban Irish")
GENRES = _words("jazz rock soul folk blues disco opera swing reggae country techno classical")
ROOMS = _lines("kitchen\nliving room\nbedroom\noffice\ngarage\nbathroom\nhall\nattic\nstudio")
SKIES = _lines("sunny\ncloudy\nrainy\nwindy\nfoggy\nsnowy\nclear\nstormy\nmostly dry\nhumid\nmild")
ADVICE = _lines(
    """take an umbrella
    bring a warm coat
    a light jacket is enough
    wear good shoes
    sun cream is a good idea
    gloves may help
    no need for a coat"""
)
STREETS = tuple(
    f"{name} {kind}"
    for name in _words("Mill Park Elm Oak High Lake King Queen Church Bridge Market Station Hill")
    for kind in ("Street", "Road", "Lane")
)
JOBS = _words(
    "baker nurse pilot farmer lawyer singer writer painter plumber tailor teacher chef dentist "
    "driver doctor miner sailor waiter barber judge coach guard clerk cook potter"
)
PETS = _words("cat dog parrot rabbit turtle hamster goldfish pony lizard canary duck goat mouse")
PARTS = _words(
    "bolt hinge valve gear spring washer bracket pump filter fuse lever pipe switch cable motor "
    "sensor clamp nozzle piston rivet socket spacer wheel belt hook screw latch magnet"
)
RIVERS = _words("Tarn Aire Wey Nidd Ouse Avon Dart Lune Mole Neath Swale Tay Usk Wear Yare Eden")
ANIMALS = _words("Foxes Owls Bears Wolves Hawks Tigers Sharks Otters Ravens Bulls Lynxes Cobras")
THINGS = _words(
    "apples pens mugs books stamps shirts plates candles kites balls pears lemons cards hats bags "
    "boxes toys rings bowls spoons lamps plums scarves pencils badges bottles brushes towels socks "
    "muffins pies rolls shells beads coins marbles stickers posters magnets puzzles ribbons buttons"
)
FRUITS = _words("apples pears plums peaches lemons melons cherries figs grapes limes oranges dates")
BAKES = _words("muffins cookies rolls pies scones tarts cakes buns bagels waffles donuts pretzels")
PLANTS = _words("roses tulips carrots beans tomatoes onions ferns daisies peppers lilies cabbages")
PRIZES = _words("bike guitar tent camera drum watch jacket skateboard telescope radio tablet desk")
SHOPS = _lines(
    """the corner shop
    the market
    a toy store
    the mall
    a garage sale
    the school fair
    a small shop
    the book shop
    the farm stand
    the gift shop"""
)
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}


# ------------------------------------------------------------------------------------ dialogue


@dataclass(frozen=True)
class Slot:
    """A value the assistant needs: how it is asked for, and the phrase that names it."""

    name: str
    ask: str
    phrase: str


@dataclass(frozen=True)
class Task:
    """A kind of booking: `want` opens the user's turn, `thing` names the booking in full."""

    want: str
    thing: str
    slots: tuple[Slot, ...]
    done: str
    extra: str
    note: str


DAY = Slot("day", "[which day|what day] [suits you|is best|should I look at]", "on {day}")
TIME = Slot(
    "time", "[what time|at what time] [do you want it|shall it be|works for you]", "at {time}"
)
PARTY = Slot("party", "how many people [will come|are you|should I plan for]", "for {party} people")

TASKS: tuple[Task, ...] = (
    Task(
        "[a table at|a dinner table at|to eat at|a seat at] the {place}",
        "a table at the {place}",
        (PARTY, DAY, TIME, Slot("name", "[what|which] name shall I use", "under the name {name}")),
        "[the {place} has a table for you|your table at the {place} is booked|"
        "the table at the {place} is yours]",
        "[They serve {food} food and the bill is about {price} dollars each|It is a {food} place "
        "on {street}, and they keep the table for {few} minutes|You will find it on {street}. "
        "The {food} menu costs {price} dollars]",
        "The {place} on {street} serves {food} food. {name} booked a table for {party} people "
        "on {day} at {time}, and the bill came to {price} dollars each.",
    ),
    Task(
        "[a train to {city}|a train ticket to {city}|to go to {city} by train]",
        "a train to {city}",
        (
            Slot("start", "[where do you start|which city do you leave from]", "from {start}"),
            DAY,
            Slot("time", "[when|at what time] would you like to leave", "at {time}"),
            Slot("party", "how many [tickets|seats] do you need", "with {party} seats"),
        ),
        "[I found a good train to {city}|your seats to {city} are booked|the train to {city} is "
        "set]",
        "[It leaves from platform {few} and costs {price} dollars|The fare is {price} dollars and "
        "the trip takes {few} hours|Each ticket is {price} dollars, and you sit in coach {few}]",
        "The train from {start} to {city} leaves at {time} on {day}. {name} paid {price} dollars "
        "for {party} seats and waited at platform {few}.",
    ),
    Task(
        "[a room|a hotel room|a quiet room|a bed] in {city}",
        "a room in {city}",
        (
            Slot("party", "for how many people", "for {party} people"),
            Slot("nights", "[how many nights|how long] will you stay", "for {nights} nights"),
            Slot("day", "[which|what] day do you arrive", "[from|starting] {day}"),
        ),
        "[the {place} Hotel has a room|your room at the {place} Hotel is ready|"
        "I got you a room at the {place} Hotel]",
        "[It is {price} dollars a night with breakfast|The hotel is on {street}, and a night costs "
        "{price} dollars|You pay {price} dollars a night at the desk, and check in opens at "
        "{time}]",
        "{name} stayed in {city} for {nights} nights. The {place} Hotel on {street} had a room for "
        "{party} people from {day}, and each night cost {price} dollars.",
    ),
    Task(
        "[some {genre} music|some {genre}|a {genre} song|a bit of {genre}] by {artist}",
        "{genre} by {artist}",
        (
            Slot("room", "[in which room|where] should I play it", "in the {room}"),
            Slot("level", "how loud [should it be|do you want it]", "at volume {level}"),
            Slot("minutes", "[for how long|how long shall it play]", "for {minutes} minutes"),
        ),
        "[now playing {genre} by {artist}|your {genre} music is on|the {genre} list has started]",
        "[The first song is {song}, and then comes {song2}|It starts with {song} from the album "
        "{song2}|You will hear {song} first. Say next to skip to {song2}]",
        "{artist} plays {genre}. {name} put on the song {song} in the {room} at volume {level}, "
        "and the music went on for {minutes} minutes until {song2} ended.",
    ),
    Task(
        "[to know the weather in {city}|the forecast for {city}|the weather for {city}]",
        "the weather in {city}",
        (
            DAY,
            Slot("part", "[what|which] part of the day [matters|is it about]", "in the {part}"),
            Slot("unit", "[do you want|shall I use] Celsius or Fahrenheit", "in degrees {unit}"),
        ),
        "[it will be {sky} in {city}|{city} looks {sky}|expect a {sky} {part} in {city}]",
        "[The high is {warm} degrees and the low is {cool}, so {advice}|Between {cool} and {warm} "
        "degrees, with wind at {minutes} miles an hour: {advice}|We see {warm} degrees at best, "
        "and the chance of rain is {price} percent. For you: {advice}]",
        "On {day} the sky over {city} was {sky} in the {part}. It was {warm} degrees at noon and "
        "{cool} degrees at night, and {name} said: {advice}.",
    ),
    Task(
        "[a taxi to|a cab to|a car to|a ride to] {street}",
        "a taxi to {street}",
        (
            Slot("start", "where [are you|shall we pick you up]", "from the {place}"),
            TIME,
            Slot("party", "how many [of you will ride|people are you]", "for {party} people"),
        ),
        "[your taxi to {street} is on its way|the cab to {street} is booked|a driver is set]",
        "[Look for a {color} car driven by {name}; the ride costs {price} dollars|{name} drives a "
        "{color} car and you pay {price} dollars|The {color} cab takes {minutes} minutes and the "
        "fare is {price} dollars]",
        "A {color} taxi stopped at the {place} at {time}. {name} drove {party} people to {street}; "
        "it took {minutes} minutes and the fare was {price} dollars.",
    ),
)

USER_OPEN = (
    "[Hi|Hello|Good morning|Good evening|Hey]. [I would like|I want|I need] ",
    "[I would love|I want|I need|We need|I would like] ",
    "[Could you help me?|Please help me.|One question:] I [want|need|would like] ",
    "[My friend {friend} and I|My wife and I|We all|{friend} and I] [want|would like|need] ",
)
USER_GIVE = "[Sure, |Oh, |Well, |Let us say |I think |||]{values}[, please|, thanks||]."
USER_YES = (
    "[Yes, please|Yes, that is right|That works|Perfect, go on|Right, thank you|Yes, do it].",
    "[Sounds good|All correct|Great, yes|Fine with me|Exactly].",
)
USER_CHANGE = "[Almost|Not quite|Wait]: [make it|I meant|please change it to] {values}."
BOT_ASK = "[Sure|Of course|Happy to help|Gladly|No problem|I can do that]. {questions}?"
BOT_CHECK = (
    "[Let me check|Just to be sure|So that is|To confirm]: {thing} {values}. "
    "[Is that right|Shall I go on|Correct|Is this fine]?",
    "[Okay|Thanks|Got it|Good], {thing} {values}. [Shall I go on|Is that all|Anything to change]?",
)
BOT_DONE = "[Great news|All done|Good|Okay|Done|Wonderful|There we go], {done}"
BOT_RECAP = "[That is|I noted|You asked for|I wrote down|This is]"
BOT_END = (
    "[Your code is {code}|The reference is {code}|Please keep the number {code}].",
    "[Anything else|Can I do more for you|Is there anything else you need]?",
    "[Enjoy|Have a nice [day|evening|week]|Have a good time|See you soon]!",
    "",
)


# ------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Field:
    """A column: its values (words or a number range), the fact it states and how to ask for it."""

    name: str
    values: Words | range
    fact: str
    ask: str
    most: str = ""
    least: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of record: what the list is called, the keys of its rows and the columns."""

    title: str
    one: str
    keys: Words
    fields: tuple[Field, ...]


TITLES = tuple(f"{front} {back}" for front in FRONTS for back in BACKS)

KINDS: tuple[Kind, ...] = (
    Kind(
        "[people|members|guests|staff]",
        "person",
        PEOPLE,
        (
            Field(
                "age",
                range(18, 80),
                "{key} is {v} years old",
                "how old is {key}",
                "oldest",
                "youngest",
            ),
            Field(
                "town",
                CITIES,
                "{key} lives in {v}",
                "[where does {key} live|what is the town of {key}]",
            ),
            Field("job", JOBS, "{key} works as a {v}", "what [does {key} do|is the job of {key}]"),
            Field("pet", PETS, "{key} [has|keeps] a {v}", "what pet does {key} have"),
            Field(
                "height",
                range(150, 200),
                "{key} is {v} cm tall",
                "how tall is {key}",
                "tallest",
                "shortest",
            ),
        ),
    ),
    Kind(
        "[books|novels|titles on the shelf]",
        "book",
        TITLES,
        (
            Field("author", SURNAMES, "{key} [was written by|is by] {v}", "who wrote {key}"),
            Field(
                "year",
                range(1901, 2024),
                "{key} came out in {v}",
                "when did {key} come out",
                "newest",
                "oldest",
            ),
            Field(
                "pages",
                range(60, 200),
                "{key} has {v} pages",
                "how many pages does {key} have",
                "longest",
                "shortest",
            ),
            Field(
                "price",
                range(4, 40),
                "{key} costs {v} dollars",
                "[how much|what] does {key} cost",
                "dearest",
                "cheapest",
            ),
        ),
    ),
    Kind(
        "[parts|spare parts|stock items]",
        "part",
        tuple(f"the {part}" for part in PARTS),
        (
            Field(
                "stock",
                range(2, 120),
                "{key} has {v} pieces in stock",
                "how many pieces of {key} [are left|do we have]",
                "most common",
                "rarest",
            ),
            Field(
                "bin",
                tuple(f"{a}{n}" for a in "ABCDEFGH" for n in range(1, 10)),
                "{key} lies in bin {v}",
                "[in which bin is|where is] {key}",
            ),
            Field(
                "price",
                range(2, 60),
                "{key} costs {v} dollars",
                "[how much|what] does {key} cost",
                "dearest",
                "cheapest",
            ),
            Field("color", COLORS, "{key} is {v}", "what color is {key}"),
            Field("maker", SURNAMES, "{key} is made by {v}", "who makes {key}"),
        ),
    ),
    Kind(
        "[cities|towns|places]",
        "city",
        CITIES,
        (
            Field(
                "population",
                range(20, 200),
                "{key} has {v} thousand people",
                "how many people live in {key}",
                "largest",
                "smallest",
            ),
            Field("river", RIVERS, "{key} lies on the {v}", "which river runs through {key}"),
            Field("mayor", SURNAMES, "the mayor of {key} is {v}", "who is the mayor of {key}"),
            Field(
                "parks",
                range(2, 60),
                "{key} has {v} parks",
                "how many parks does {key} have",
                "greenest",
                "least green",
            ),
        ),
    ),
    Kind(
        "[teams|clubs|sides in the league]",
        "team",
        tuple(f"the {city} {animal}" for city in CITIES for animal in ANIMALS),
        (
            Field(
                "points",
                range(5, 90),
                "{key} have {v} points",
                "how many points do {key} have",
                "best",
                "weakest",
            ),
            Field("coach", SURNAMES, "{key} are coached by {v}", "who coaches {key}"),
            Field("color", COLORS, "{key} play in {v}", "what color do {key} wear"),
            Field(
                "goals",
                range(3, 80),
                "{key} scored {v} goals",
                "how many goals did {key} score",
                "most dangerous",
                "most harmless",
            ),
        ),
    ),
)

LIST_INTRO = (
    "[Here are|These are|Look at] [some|our|my|the] {title}[:|, one per line:]",
    "[Here is|This is|I have] a [list|table|small list|short list] of {title}:",
)
LIST_ASK = "[|Question: |Tell me, |Please tell me: |My question is: |Now, ]{question}?"
ANSWER_OPEN = (
    "[In the list, |From the list, |In your table, |As listed, |According to the list, |||]"
)
SUPPORT = "[Also, |The same line says that |In addition, |We also see that |Besides, |Moreover, ]"
CONTRAST = "[By contrast, |For comparison, |On the other hand, |As for the others, |Meanwhile, ]"


# ---------------------------------------------------------------------------------------- code


@dataclass(frozen=True)
class CodePlan:
    """A function: what it does (docstring and request), its names, its body and an example call."""

    does: str
    names: Words
    args: str
    body: Words
    call: str
    remark: str


def _plan(does: str, names: str, args: str, body: str, call: str, remark: str) -> CodePlan:
    lines = tuple(line.replace("....", "    ") for line in _lines(body))
    return CodePlan(does, _words(names), args, lines, call, remark)


SEQ_NAMES = _words("values numbers items data nums xs entries row")
TEXT_NAMES = _words("text word line phrase name s message")
ONE_NAMES = _words("n x value number amount k")
ACC_NAMES = _words("total result out acc answer")
LOOP_NAMES = _words("item v i entry each e")

CODE_PLANS: tuple[CodePlan, ...] = (
    _plan(
        "[adds {k} to|increases by {k}] every number of a list",
        "add_all shift_up raise_all",
        "{seq}",
        "return [{i} + {k} for {i} in {seq}]",
        "{list}",
        "the list is walked once and {k} is added each time",
    ),
    _plan(
        "[multiplies|scales] every number of a list by {k}",
        "scale_all times_all stretch",
        "{seq}",
        "{acc} = []\nfor {i} in {seq}:\n....{acc}.append({i} * {k})\nreturn {acc}",
        "{list}",
        "each product with {k} goes into a new list",
    ),
    _plan(
        "counts [the numbers|how many numbers are] above {k}",
        "count_above count_big how_many",
        "{seq}",
        "{acc} = 0\nfor {i} in {seq}:\n....if {i} > {k}:\n........{acc} += 1\nreturn {acc}",
        "{list}",
        "the counter grows only when a number is larger than {k}",
    ),
    _plan(
        "keeps only the numbers [below|smaller than] {k}",
        "keep_small below_limit filter_low",
        "{seq}",
        "return [{i} for {i} in {seq} if {i} < {k}]",
        "{list}",
        "numbers of {k} or more are left out",
    ),
    _plan(
        "returns the sum of the [multiples of {k}|numbers divisible by {k}]",
        "sum_multiples add_every total_of",
        "{seq}",
        "{acc} = 0\nfor {i} in {seq}:\n....if {i} % {k} == 0:\n........{acc} += {i}\nreturn {acc}",
        "{list}",
        "the remainder tells whether {k} divides the number",
    ),
    _plan(
        "[finds|returns] the largest number or {k} if the list is empty",
        "largest biggest find_max",
        "{seq}",
        "if not {seq}:\n....return {k}\nreturn max({seq})",
        "{list}",
        "the empty list is handled first",
    ),
    _plan(
        "[finds|returns] the smallest number without using min",
        "smallest lowest find_min",
        "{seq}",
        "{acc} = {seq}[0]\nfor {i} in {seq}:\n....if {i} < {acc}:\n........{acc} = {i}\n"
        "return {acc}",
        "{list}",
        "the best value so far is kept in {acc}",
    ),
    _plan(
        "[computes|returns] the mean of a list",
        "mean average avg_of",
        "{seq}",
        "{acc} = sum({seq})\nreturn {acc} / len({seq})",
        "{list}",
        "the sum is divided by the length",
    ),
    _plan(
        "[tells|checks] whether a number is [even|divisible by two]",
        "is_even even_check",
        "{one}",
        "return {one} % 2 == 0",
        "{k}",
        "the result is True or False",
    ),
    _plan(
        "[checks|tells] if a number lies between {k} and {m}",
        "in_range is_between fits_in",
        "{one}",
        "return {k} <= {one} <= {m}",
        "{k}",
        "both ends count as inside",
    ),
    _plan(
        "[limits|clips] a number to at most {m}",
        "clip cap_at limit",
        "{one}",
        "if {one} > {m}:\n....return {m}\nreturn {one}",
        "{k}",
        "smaller numbers stay as they are",
    ),
    _plan(
        "[counts|returns the number of] vowels in a text",
        "count_vowels vowels_in num_vowels",
        "{text}",
        '{acc} = 0\nfor {i} in {text}.lower():\n....if {i} in "aeiou":\n........{acc} += 1\n'
        "return {acc}",
        '"{word}"',
        "upper case letters are counted too",
    ),
    _plan(
        "[reverses|turns around] a text",
        "reverse flip backwards turn_back",
        "{text}",
        "return {text}[::-1]",
        '"{word}"',
        "the slice walks from the end to the start",
    ),
    _plan(
        "[repeats|writes] a text {k} times with a {mark}",
        "repeat_text echo say_again",
        "{text}",
        'parts = [{text}] * {k}\nreturn "{sign}".join(parts)',
        '"{word}"',
        "there is no {mark} at the end",
    ),
    _plan(
        "[checks|tells] if a text is the same backwards",
        "is_palindrome same_back mirror",
        "{text}",
        "{acc} = {text}.lower()\nreturn {acc} == {acc}[::-1]",
        '"{word}"',
        "case does not matter here",
    ),
    _plan(
        "[returns|takes] the first {k} letters in upper case",
        "head_upper short_code make_tag",
        "{text}",
        "{acc} = {text}[:{k}]\nreturn {acc}.upper()",
        '"{word}"',
        "short texts are simply returned in full",
    ),
    _plan(
        "[replaces|swaps] spaces by a {mark}",
        "join_words swap_spaces slug",
        "{text}",
        'parts = {text}.split(" ")\nreturn "{sign}".join(parts)',
        '"{word} {word2}"',
        "split and join do the work",
    ),
    _plan(
        "[counts|tallies] how often each letter occurs",
        "letter_counts tally histogram",
        "{text}",
        "{acc} = {{}}\nfor {i} in {text}:\n....{acc}[{i}] = {acc}.get({i}, 0) + 1\nreturn {acc}",
        '"{word}"',
        "the dictionary starts empty and grows with new letters",
    ),
    _plan(
        "[returns|computes] the product of a list starting from {k}",
        "product multiply prod_of",
        "{seq}",
        "{acc} = {k}\nfor {i} in {seq}:\n....{acc} *= {i}\nreturn {acc}",
        "{list}",
        "for an empty list the answer is {k}",
    ),
    _plan(
        "[sums|adds up] the squares of the numbers from 1 to n",
        "square_sum sum_squares",
        "{one}",
        "return sum({i} ** 2 for {i} in range(1, {one} + 1))",
        "{k}",
        "range stops one before its end",
    ),
    _plan(
        "[computes|returns] the factorial of a number",
        "factorial fact",
        "{one}",
        "{acc} = 1\nfor {i} in range(2, {one} + 1):\n....{acc} *= {i}\nreturn {acc}",
        "{k}",
        "zero gives 1",
    ),
    _plan(
        "[converts|turns] {unit} into {unit2} at {k} each",
        "convert to_units change_unit",
        "{one}",
        "rate = {k}\nreturn {one} * rate",
        "{m}",
        "one of the {unit} makes {k} {unit2}",
    ),
    _plan(
        "[takes|picks] every item at a step of {k}",
        "every_nth pick_step thin_out",
        "{seq}",
        "{acc} = {seq}[::{k}]\nreturn {acc}",
        "{list}",
        "the first item is always kept",
    ),
    _plan(
        "[drops|removes] doubles but keeps the order",
        "unique no_doubles distinct",
        "{seq}",
        "{acc} = []\nfor {i} in {seq}:\n....if {i} not in {acc}:\n........{acc}.append({i})\n"
        "return {acc}",
        "{list}",
        "only the first of equal items stays",
    ),
    _plan(
        "[computes|returns] the price with a discount of {k} percent",
        "discount sale_price",
        "{one}",
        "off = {one} * {k} / 100\nreturn {one} - off",
        "{m}",
        "the discount is taken off at the end",
    ),
    _plan(
        "[sorts|orders] words by length and keeps {k}",
        "by_length shortest order_words",
        "{seq}",
        "{acc} = sorted({seq}, key=len)\nreturn {acc}[:{k}]",
        '["{word}", "{word2}"]',
        "the shortest words come first",
    ),
)

CODE_WORDS = _words(
    "apple level stone river noon cloud happy table radar candle music orange kayak winter robot "
    "garden pencil mirror banana civic ladder silver turtle window yellow rocket harbor market"
)
UNITS = _words("feet hours coins boxes miles cups days points steps tokens bars crates")
MARKS = {"dash": "-", "comma": ",", "dot": ".", "plus": "+", "star": "*", "slash": "/"}
CODE_ASK = (
    "[Write|Please write|Create|Give me|I need] a [Python |short |small |]function "
    "[named|called] {f} that {does}.",
    "[Can you write|Do you have|May I have] a [Python |short |]function [named|called] {f} "
    "that {does}?",
    "[How do I write|How would you write] a [Python |small |]function {f} that {does}?",
    "[Define|Implement|Code|Show me] {f}({args}), a function that {does}.",
)
CODE_HINT = "[ The argument is called {args}.| Use {args} as the argument.| Keep it short.||||]"
CODE_OPEN = "[Here is|This is|Sure, here is|Take|Try] {f}[:|, which {does}:| as asked:|:]"
CODE_END = (
    "[Note that |Mind that |As you see, |Remember: |In short, |]{remark}.",
    "[You call it with|An example call is|Try] {f}({call})[.|: {remark}.]",
    "",
)


# ---------------------------------------------------------------------------------------- math


@dataclass(frozen=True)
class MathPlan:
    """A word problem: number ranges, and steps (name, expression, sentence with its `{eq}`)."""

    story: str
    question: str
    ranges: dict[str, tuple[int, int]]
    steps: tuple[tuple[str, str, str], ...]


MATH_PLANS: tuple[MathPlan, ...] = (
    MathPlan(
        "{who} [buys|gets|picks up] {a} {things} for {p} dollars each and {b} {others} for {q} "
        "dollars each at {shop}.",
        "How [much|many dollars] does {who} [pay|spend] [in all|in total|altogether]?",
        {"a": (2, 12), "p": (2, 9), "b": (2, 12), "q": (2, 9)},
        (
            ("x", "a * p", "[the {things} cost|{who} pays for the {things}] {eq} dollars"),
            ("y", "b * q", "[the {others} cost|for the {others} it is] {eq} dollars"),
            ("z", "x + y", "[together that makes|the total is|{who} spends] {eq} dollars"),
        ),
    ),
    MathPlan(
        "{who} [has|goes to {shop} with|takes along] {m} dollars. {They} buys {a} {things} at {p} "
        "dollars each[ and gives {b} dollars to {pal}| and lends {pal} {b} dollars].",
        "How [much money|many dollars] does {who} have [left|now|in the end]?",
        {"m": (40, 150), "a": (2, 10), "p": (2, 9), "b": (2, 20)},
        (
            ("x", "a * p", "[the {things} cost|{who} pays] {eq} dollars"),
            ("y", "m - x", "[that leaves|after the shop there are] {eq} dollars"),
            ("z", "y - b", "[after giving {b} to {pal}, {who} has|now {who} keeps] {eq} dollars"),
        ),
    ),
    MathPlan(
        "{who} has {n} [boxes|bags|jars|drawers] with {k} {things} in each. {They} [gives|hands] "
        "{g} of them to {pal} and then finds {b} more.",
        "How many {things} does {who} have [now|in the end|at last]?",
        {"n": (2, 12), "k": (3, 15), "g": (3, 40), "b": (2, 30)},
        (
            ("x", "n * k", "[at first {who} has|all boxes hold|the start is] {eq} {things}"),
            ("y", "x - g", "[after the gift there are|{who} keeps] {eq} {things}"),
            ("z", "y + b", "[with the new ones that is|finding {b} more gives] {eq} {things}"),
        ),
    ),
    MathPlan(
        "{who} has {a} {things} and {pal} has {b} {things}. They [share|split] all of them equally "
        "[among|between] {k} friends.",
        "How many {things} does each friend get?",
        {"a": (6, 90), "b": (6, 90), "k": (2, 9)},
        (
            ("x", "a + b", "[together they have|there are|{who} and {pal} own] {eq} {things}"),
            ("y", "x / k", "[each friend gets|one share is|sharing gives] {eq} {things}"),
        ),
    ),
    MathPlan(
        "{who} wants a {prize} that costs {c} dollars. {They} already has {s} dollars and saves "
        "{p} dollars a week for {w} weeks.",
        "How [many dollars are still missing|much more does {who} need]?",
        {"c": (80, 200), "s": (5, 40), "p": (3, 12), "w": (2, 10)},
        (
            ("x", "p * w", "[in {w} weeks {who} saves|the savings are] {eq} dollars"),
            ("y", "s + x", "[with the first money it is|{they} then has] {eq} dollars"),
            ("z", "c - y", "[the {prize} needs another|still missing are] {eq} dollars"),
        ),
    ),
    MathPlan(
        "{who} is {a} years old. {pal} is {k} years older than {who}, and {third} is [twice|two "
        "times] as old as {pal}.",
        "[How old are all three together|What is the sum of the three ages]?",
        {"a": (4, 30), "k": (2, 12)},
        (
            ("x", "a + k", "[{pal} is|the age of {pal} is] {eq} years"),
            ("y", "2 * x", "[{third} is|the age of {third} is] {eq} years"),
            ("u", "a + x", "[{who} and {pal} are together|the first two make] {eq} years"),
            ("z", "u + y", "[all three make|adding {third} gives] {eq} years"),
        ),
    ),
    MathPlan(
        "{who} [walks|runs|bikes] {d} miles a day for {n} days. {pal} [covers|does] {e} miles a "
        "day for {m} days.",
        "How many miles [farther does {who} go|more does {who} cover] than {pal}?",
        {"d": (4, 15), "n": (4, 12), "e": (2, 9), "m": (2, 9)},
        (
            ("x", "d * n", "[{who} goes|the way of {who} is] {eq} miles"),
            ("y", "e * m", "[{pal} goes|the way of {pal} is] {eq} miles"),
            ("z", "x - y", "[the difference is|{who} leads by] {eq} miles"),
        ),
    ),
    MathPlan(
        "{who} bakes {t} trays of {bakes} with {k} on each tray. {They} sells {s} and [packs|puts] "
        "the rest into bags of {g}.",
        "How many bags [does {who} fill|are there]?",
        {"t": (3, 12), "k": (4, 15), "s": (6, 60), "g": (2, 9)},
        (
            ("x", "t * k", "[{who} bakes|the trays hold|there are] {eq} {bakes}"),
            ("y", "x - s", "[after the sale there are|what stays is] {eq} {bakes}"),
            ("z", "y / g", "[they fill|in bags of {g} that is|{who} needs] {eq} bags"),
        ),
    ),
    MathPlan(
        "A book has {p} pages. {who} reads {r} pages a day for {n} days[ and wants to finish| and "
        "then plans to end] the rest in {m} days.",
        "How many pages a day [must|should] {who} read then?",
        {"p": (60, 200), "r": (4, 20), "n": (2, 9), "m": (2, 8)},
        (
            ("x", "r * n", "[{who} has read|the first part is] {eq} pages"),
            ("y", "p - x", "[the book still has|there remain|left are] {eq} pages"),
            ("z", "y / m", "[per day that is|each day {who} reads] {eq} pages"),
        ),
    ),
    MathPlan(
        "{who} [works|helps] {h} hours a day for {d} days at {shop} and earns {p} dollars an hour. "
        "{They} [spends {s} dollars on|pays {s} dollars for] a {prize}.",
        "How [many dollars are|much money is] left?",
        {"h": (2, 6), "d": (2, 6), "p": (3, 12), "s": (10, 90)},
        (
            ("x", "h * d", "[{who} works|the work takes] {eq} hours"),
            ("y", "x * p", "[{they} earns|the pay is|this brings] {eq} dollars"),
            ("z", "y - s", "[after the {prize} there are|{who} keeps] {eq} dollars"),
        ),
    ),
    MathPlan(
        "In the garden of {who} there are {r} rows of {k} {plants}. {w} of them [dry out|are eaten "
        "by birds], and {pal} plants {b} new ones.",
        "How many {plants} [grow there now|are there in the end]?",
        {"r": (3, 12), "k": (4, 14), "w": (3, 30), "b": (4, 40)},
        (
            ("x", "r * k", "[the rows have|{who} starts with] {eq} {plants}"),
            ("y", "x - w", "[without the lost ones it is|there remain] {eq} {plants}"),
            ("z", "y + b", "[{pal} brings it to|with the new ones we get] {eq} {plants}"),
        ),
    ),
    MathPlan(
        "{who} [sold|made|found] {a} {things} in [April|May|June] and half as many [a month "
        "later|the next month]. {pal} [sold|made|found] {b}.",
        "How many {things} is that [in all|altogether|for both of them]?",
        {"a": (8, 120), "b": (5, 50)},
        (
            ("x", "a / 2", "[half as many is|the next month it was] {eq} {things}"),
            ("y", "a + x", "[{who} comes to|both months make] {eq} {things}"),
            ("z", "y + b", "[with {pal} it is|both of them have] {eq} {things}"),
        ),
    ),
    MathPlan(
        "{who} has {a} {things}. {pal} has {k} times as many, and {third} has {m} fewer than "
        "{pal}.",
        "How many {things} [do {who} and {third} have together|have {who} and {third} in all]?",
        {"a": (4, 30), "k": (2, 6), "m": (3, 20)},
        (
            ("x", "k * a", "[{pal} has|for {pal} we get] {eq} {things}"),
            ("y", "x - m", "[{third} has|this means {third} owns] {eq} {things}"),
            ("z", "a + y", "[{who} and {third} have|together that is] {eq} {things}"),
        ),
    ),
    MathPlan(
        "A [bus|train|boat] leaves {city} with {a} people. At the first stop {b} get off and {c} "
        "get on. At the next stop half of them get off.",
        "How many people are [still on board|left on it]?",
        {"a": (12, 90), "b": (3, 20), "c": (2, 30)},
        (
            ("x", "a - b", "[after some get off there are|it carries] {eq} people"),
            ("y", "x + c", "[with the new ones there are|the new count is] {eq} people"),
            ("z", "y / 2", "[half of them stay, so it is|that leaves] {eq} people"),
        ),
    ),
    MathPlan(
        "{who} needs {k} [cups of flour|eggs|spoons of sugar] for one [cake|batch] and makes {n} "
        "of them. {They} has {h} and {pal} brings {b}.",
        "How many more does {who} [need|have to buy]?",
        {"k": (2, 9), "n": (4, 14), "h": (3, 20), "b": (2, 15)},
        (
            ("x", "k * n", "[in total {who} needs|the need is] {eq}"),
            ("y", "h + b", "[at hand there are|{who} and {pal} have] {eq}"),
            ("z", "x - y", "[to buy are|the gap is|{who} lacks] {eq}"),
        ),
    ),
    MathPlan(
        "At {shop} a {prize} costs {p} dollars, but [today|this week] it is {d} dollars "
        "[off|less]. {who} buys {n} of them and pays {f} dollars for [a bag|the trip|wrapping].",
        "What does {who} pay [in all|in total]?",
        {"p": (12, 60), "d": (2, 9), "n": (2, 6), "f": (2, 9)},
        (
            ("x", "p - d", "[one {prize} now costs|the new price is] {eq} dollars"),
            ("y", "n * x", "[{n} of them cost|for {n} it is] {eq} dollars"),
            ("z", "y + f", "[with the rest {who} pays|the bill is] {eq} dollars"),
        ),
    ),
    MathPlan(
        "{who} [plays the drum|reads|swims|trains] {m} minutes on each of the 5 school days and "
        "{w} minutes on each of the 2 days of the weekend.",
        "How many minutes is that [a week|in one week]?",
        {"m": (5, 30), "w": (6, 40)},
        (
            ("x", "5 * m", "[the school days give|from Monday to Friday it is] {eq} minutes"),
            ("y", "2 * w", "[the weekend gives|on the two free days it is] {eq} minutes"),
            ("z", "x + y", "[the whole week has|{who} reaches] {eq} minutes"),
        ),
    ),
    MathPlan(
        "In a game {who} [hits|makes] {a} shots of 3 points and {b} shots of 2 points. {pal} "
        "scores {c} points.",
        "[By how many points does {who} win|How many points is {who} ahead]?",
        {"a": (3, 20), "b": (3, 20), "c": (4, 50)},
        (
            ("x", "a * 3", "[the long shots give|for the 3 point shots it is] {eq} points"),
            ("y", "b * 2", "[the short shots give|for the others it is] {eq} points"),
            ("u", "x + y", "[{who} has|the score of {who} is] {eq} points"),
            ("z", "u - c", "[{who} is ahead by|compared with {pal} that is] {eq} points"),
        ),
    ),
    MathPlan(
        "{who} builds a fence around a [yard|field|garden] that is {l} meters long and {w} meters "
        "wide. One meter costs {p} dollars.",
        "How [much|many dollars] does the fence cost?",
        {"l": (4, 25), "w": (3, 20), "p": (2, 6)},
        (
            ("x", "l + w", "[length and width make|one long and one short side are] {eq} meters"),
            ("y", "2 * x", "[all the way around it is|the fence has] {eq} meters"),
            ("z", "y * p", "[the price is|{who} pays] {eq} dollars"),
        ),
    ),
    MathPlan(
        "{who} picks {a} {fruits} and {pal} picks {b} fewer. They [eat|lose] {c} and sell the rest "
        "[at|for] 2 dollars each.",
        "How [many dollars|much money] do they [get|make]?",
        {"a": (12, 60), "b": (2, 20), "c": (3, 20)},
        (
            ("x", "a - b", "[{pal} picks|the share of {pal} is] {eq} {fruits}"),
            ("y", "a + x", "[together they have|in the basket are] {eq} {fruits}"),
            ("u", "y - c", "[they sell|left for sale are] {eq} {fruits}"),
            ("z", "u * 2", "[that brings|they make] {eq} dollars"),
        ),
    ),
    MathPlan(
        "A library has {s} shelves with {b} books each. {who} lends out {l} books on {day} and "
        "gets {r} back.",
        "How many books are [on the shelves|there] [now|after that]?",
        {"s": (3, 12), "b": (5, 16), "l": (4, 40), "r": (2, 20)},
        (
            ("x", "s * b", "[the shelves hold|in the beginning there are] {eq} books"),
            ("y", "x - l", "[without the lent ones it is|on {day} it falls to] {eq} books"),
            ("z", "y + r", "[with the returned ones we have|it goes up to] {eq} books"),
        ),
    ),
    MathPlan(
        "{who} has {k} [cats|dogs|goats|ponies], and each eats {f} cups of food a day. There are "
        "{h} cups [in the barn|at home|in the bag].",
        "How many cups are left after {d} days?",
        {"k": (2, 8), "f": (2, 6), "h": (60, 200), "d": (2, 8)},
        (
            ("x", "k * f", "[one day takes|all of them eat] {eq} cups"),
            ("y", "x * d", "[in {d} days they eat|{d} days take] {eq} cups"),
            ("z", "h - y", "[{who} still has|what is left is] {eq} cups"),
        ),
    ),
)

MATH_OPEN = (
    "[Let us work it out|We go step by step|Let us see|We solve this in order|Let us count].",
    "",
)
MATH_LINKS = (
    "[First, |To begin, |At the start, |First of all, ]",
    "[Then |Next, |After that, |Now ]",
    "[So |Therefore |Hence |Thus |In the end, ]",
)
MATH_CLOSE = (
    "[So the answer is|The answer is|The result is|We get|That makes] {answer}.",
    "",
    "",
)
MATH_TASK = "[|||Solve this: |Problem: |Here is a puzzle. |Can you solve it? ]"
