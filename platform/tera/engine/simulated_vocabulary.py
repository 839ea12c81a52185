"""The simulated engine's vocabulary: bytes, words and a few strings that other scripts need.

Ids 0 to 255 are single bytes, 256 ends a text, and then come whole words with their leading
space. Everything else is spelled in bytes, so one visible character may span several tokens, as it
does with real models.
"""

from collections.abc import Iterable

END_OF_TEXT = "<|end|>"

_WORDS = """
a about above across act add after again age ago air all almost along already also always among
an and animal another answer any are area arm around as ask at away back base be bear beat
beautiful because become bed been before began begin behind believe best better between big bird
black blue boat body bone book both box boy bread break bright bring brother brought build busy
but buy by call came can car care carry case catch cause center century chance change character
chart check chief child choose circle city class clean clear climb close clothe cloud coast cold
collect color come common company compare complete condition consider contain continue control
cook cool copy corn corner correct cost could count country course cover create cross crowd cry
current cut dance danger dark day dead deal dear death decide deep degree depend describe desert
design determine develop did differ difficult direct discuss distant divide do doctor does dog
dollar done door double down draw dream dress drink drive drop dry during each ear early earth
ease east eat edge effect egg eight either electric element else end enemy energy engine enough
enter equal even evening event ever every exact example except excite exercise expect experience
explain eye face fact fair fall family famous far farm fast fat father favor fear feed feel feet
fell few field fight figure fill final find fine finger finish fire first fish fit five flat
floor flow flower fly follow food foot for force forest form forward found four fraction free
fresh friend from front fruit full fun game garden gather gave general gentle get girl give glad
glass go gold good govern grand grass great green grew ground group grow guess had hair half hand
happen happy hard has hat have he head hear heart heat heavy held help her here high hill him his
history hold hole home hope horse hot hour house how huge human hundred hurry I ice idea if
imagine in inch include indicate industry insect instant instrument interest invent iron is island
it job join joy jump just keep key kind king knew know lady lake land language large last late
laugh law lay lead learn least leave left leg length less let letter level lie life lift light
like line liquid list listen little live locate long look lost lot loud love low machine made
magnet main major make man many map mark market mass master match material matter may me mean
measure meat meet melody men metal method middle might mile milk million mind mine minute miss
mix modern molecule moment money month moon more morning most mother motion mountain mouth move
much multiply music must my name nation natural nature near necessary neck need neighbor never
new next night nine no noise noon nor north nose note nothing notice noun now number numeral
object observe occur ocean of off offer office often oil old on once one only open operate
opposite or order organ original other our out over own oxygen page paint pair paper paragraph
parent part particular party pass past path pattern pay people perhaps period person phrase pick
picture piece pitch place plain plan plane planet plant play please plural point poor populate
port pose position possible post pound power practice prepare present press pretty print probable
problem process produce product proper property protect prove provide pull push put question
quick quiet quite race radio rail rain raise ran range rather reach read ready real reason receive
record red region remember repeat reply represent require rest result rich ride right ring rise
river road rock roll room root rope rose round row rub rule run safe said sail salt same sand sat
save saw say scale school science score sea search season seat second section see seed seem
segment select self sell send sense sent sentence separate serve set settle seven several shall
shape share sharp she sheet shell shine ship shoe shop shore short should shoulder shout show side
sight sign silent silver similar simple since sing single sister sit six size skill skin sky
sleep slip slow small smell smile snow so soft soil soldier solution solve some son song soon
sound south space speak special speech speed spell spend spoke spot spread spring square stand
star start state station stay stead steam steel step stick still stone stood stop store story
straight strange stream street stretch string strong student study subject substance subtract
success such sudden suffix sugar suggest suit summer sun supply support sure surface surprise swim
syllable symbol system table tail take talk tall teach team teeth tell temperature ten term test
than thank that the their them then there these they thick thin thing think third this those
though thought thousand three through throw thus tie time tiny tire to together told tone too took
tool top total touch toward town track trade train travel tree triangle trip trouble truck true
try tube turn twenty two type under unit until up us use usual valley value vary verb very view
village visit voice vowel wait walk wall want war warm was wash watch water wave way we wear
weather week weight well went were west what wheel when where whether which while white who whole
whose why wide wife wild will win wind window wing winter wire wish with woman wonder wood word
work world would write wrong yard year yellow yes yet you young your
"""

_STRINGS = (
    *(" naïve", " café", " über", " señor", "日本", "中国", "東京", "한국", "привет", " мир"),
    *("שלום", "سلام", "مرحبا", "नमस्ते", "e\u0301", "o\u0308", "\U0001f600", "\U0001f680"),
    *("\U0001f469\u200d\U0001f680", "\U0001f1eb\U0001f1f7", "\n\n", "```", "    "),
)

SPELLED_CHARACTERS = (
    *"éüñßøçãžğı",
    *"жщюяλπΩ",
    *"שםﬡعمرق",
    *"的水火山語愛あんカ한글ไทยक",
    *"\u0301\u0308\u20d7",
    *"€→≈✓★☀",
    *"\U0001f600\U0001f680\U0001f389\U0001f9ea\U0001f98a\U0001f44d\U0001f3fd\U00020bb7",
)
"""Characters that generated text spells in byte tokens: two, three and four bytes long, including
combining and right-to-left ones."""


class Vocabulary:
    """Converts text to token ids and back, identically in every process and version.

    Attributes:
        size: the number of ids, which start at 0.
        eos_id: the id that ends a text.
        word_ids: the ids of words, each with its leading space.
    """

    eos_id = 256

    def __init__(self) -> None:
        words = [f" {word}" for word in _WORDS.split()]
        texts = [text.encode() for text in dict.fromkeys([*words, *_STRINGS])]
        self._bytes = [bytes((byte,)) for byte in range(256)] + [END_OF_TEXT.encode()] + texts
        self._ids = {text: self.eos_id + 1 + index for index, text in enumerate(texts)}
        self.size = len(self._bytes)
        self.word_ids = tuple(self._ids[word.encode()] for word in dict.fromkeys(words))
        lengths: list[set[int]] = [set() for _ in range(256)]
        for text in texts:
            lengths[text[0]].add(len(text))
        self._lengths = [sorted(each, reverse=True) for each in lengths]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`: at each position the longest known string, or else one byte.

        No text encodes to `eos_id`, so a prompt cannot contain it.

        Raises:
            UnicodeEncodeError: the text holds a lone surrogate.
        """
        data = text.encode()
        ids: list[int] = []
        position = 0
        while position < len(data):
            first = data[position]
            step, token_id = 1, first
            for length in self._lengths[first]:
                known = self._ids.get(data[position : position + length])
                if known is not None:
                    step, token_id = length, known
                    break
            ids.append(token_id)
            position += step
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of one token, which may be a part of a character.

        Raises:
            IndexError: there is no such token.
        """
        if token_id < 0:
            raise IndexError(token_id)
        return self._bytes[token_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without end-of-text tokens; U+FFFD replaces broken UTF-8.

        Raises:
            IndexError: an id is not in the vocabulary.
        """
        tokens = (self.token_bytes(token_id) for token_id in ids if token_id != self.eos_id)
        return b"".join(tokens).decode(errors="replace")
