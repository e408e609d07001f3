"""Words and codes for views and parts of the body, as files have them in several languages.

A code's value decides, whatever its meaning is called. Words are compared in capitals and without accents, by how they
begin: "Thorax seitl." and "RX TORACE LATERALE" are lateral, "BILATERAL" is not.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final, Literal

View = Literal["AP", "PA", "FRONTAL", "LATERAL", "OBLIQUE", "AXIAL", "DECUBITUS", "SEVERAL"]
FRONTAL: Final = ("AP", "PA", "FRONTAL")
Part = Literal["chest", "other", "unknown"]


def _codes(text: str, means: View) -> dict[str, View]:
    return dict.fromkeys(text.split(), means)


# SNOMED CT and, in older files, SNOMED RT. Source: DICOM PS3.16 CID 4010 (views) and CID 20 (how a patient lies).
VIEW_CODES: Final[dict[str, View]] = {
    **_codes("399348003 R-10206", "AP"),
    **_codes("272479007 R-40888 R-10214", "PA"),
    **_codes("399033003 R-10202", "FRONTAL"),
    **_codes("399067008 399198007 399173006 399352003 399260004 30730003", "LATERAL"),
    **_codes("R-102CD R-10232 R-10236 R-10228 R-10224 G-A145", "LATERAL"),
    **_codes("399182000 399236003 399184004 399135007 399356000 399038007 399006002 399160007 399059000", "OBLIQUE"),
    **_codes("399312000 260427002 260426006 399099002 399368009 399132005 399325008 399004004", "OBLIQUE"),
    **_codes("R-102C1 R-10234 R-10238 R-10220 R-40985 R-10210 R-10212 R-10204 R-10216 R-10208", "OBLIQUE"),
    **_codes("R-40783 R-40782 R-10230 R-10226 R-10252 R-10254 R-10246", "OBLIQUE"),
    **_codes("102535000 102536004 F-10317 F-10319", "DECUBITUS"),
}
# Source: PS3.16 CID 4009 and 4031. The chest, what lies in it, and regions that hold all of it.
_CHEST_CODES: Final = (
    "816094009 51185008 22943007 181607009 302551006 181216001 39607008 80891009 72410000 43799004 416319003 416550000 "
    "417437006 416152001 416775004 T-D3000 T-28000 T-32000 T-D3300 T-D3200 R-FAB54 R-FAB55 R-FAB52 R-FAB53 R-FAB56"
)
CHEST_CODES: Final = frozenset(_CHEST_CODES.split())
UNKNOWN_PART_CODES: Final = frozenset(("38266002", "T-D0010", "706342009", "R-FE0C7"))  # the whole body, a phantom

_AP: Final = re.compile(r"AP(\d|SUP|ERE|UPR|SIT|SEM|POR|MOB|$)")
_PA: Final = re.compile(r"PA(\d|ERE|UPR|STA|STE|$)")
_LATERAL: Final = re.compile(
    r"((L|R|LT|RT|X|XT|LEFT|RIGHT)?LAT(L|R|LT|RT|S|LEFT|RIGHT)?|LL|RL|YAN|SIVU|BOK|XTL)$|(XTABLE|CROSSTABLE|SWIMM)"
    r"|[LR]?LATERA(?!LIT)|LATERO|SEITL|SEITEN|SEITAUF|ANLIEG|PROFIL(?!AX)|PERFIL|BOCZN|BOCNI|SIDOBILD|SIDEBIL|ZIJDEL|OPZIJ"
    r"|DWARS|БОКОВ|ПЛАГИ|ΠΛΑΓΙ|.*(側面|侧位|側位|侧面|측면)"
)
_OBLIQUE: Final = re.compile(
    r"(LAO|RAO|LPO|RPO|LLO|RLO|MLO|SLO|OBL)$|OBLIQ(?!UIT)|OBLIC|OBLIK|OBIQ|SCHRAG|SCHRAEG|SCHUIN|SKOSN|SIKM|КОСА|КОСО"
    r"|.*(斜|사위)"
)
_AXIAL: Final = re.compile(r"AXIAL|CAUDAL|CRANIOCAUD|TANGENT")  # alone: "AP AXIAL" is a lordotic view
_DECUBITUS: Final = re.compile(r"(LLD|RLD|[LR]?DECUBS?)$|DECUBI|.*(SEITENLAG|側臥|侧卧|側卧|측와)")
_ON_THE_BACK: Final = re.compile(r"SUPIN|DORSAL|VENTRAL|COUCH|FACE$|DECUBITO$")
_FRONTAL: Final = re.compile(r"(FRONT|FRENTE|FACE$|VOORACHTER|ПРЯМ)|.*(正位|正面|正侧|正側|後前|后前|前後|前后)")
_CHEST: Final = re.compile(
    r"(CHE?ST|CXR$|THX?$|THORA|TORA[KCXSG]|TORAX|LUNG|BRUST|BROST|BORST|PULMO|POUMON|POLMON|PECHO$|PEITO$|POITRINE"
    r"|HEART|CARDIAC$|HERZ$|COEUR$|CORAZON|MEDIASTIN|TRUNK$|TORSO$|BABYGRAM|KLATK|HRUDN|GRUDN|GOGUS|KEUHKO|ГРУД|ЛЕГК|ΘΩΡΑΚ)|.*(CHEST|胸|肺|흉부)"
)
_SPINE: Final = re.compile(r".*(SPINE|SPINAL|WIRBEL|VERTEB|RACHIS|COLONN|COLUMN|WERVEL)|THORACOLUMB|LUMB|[BHL]WS$")
_NO_PART: Final = re.compile(
    r"(UNKNOWN|OTHER|UNSPECIFIED|UNDEFINED|NONE|NO|NA|N|A|NULL|BODY|WHOLE|WHOLEBODY|DEFAULT|GENERAL|PHANTOM|TEST|DX|CR"
    r"|DR|XR|RX|XRAY|X|RAY|PORT|PORTABLE|MOBILE|BED|BEDSIDE|ICU|ER|ROUTINE|TRAUMA|ADULT|INFANT|NEONATE|NOT|SPECIFIED|ANY|MISC|VIEW|FRONTAL|AP|PA|\d+)$"
)
_OTHER_PART: Final = re.compile(
    r"(HIP|HIPS|HAND|HANDS|FOOT|FEET|TOE|TOES|LEG|LEGS|ARM|ARMS|KUB|SHLDR|CADERA|PIE|MANO|MANOS|MAIN|PIED|RIBS)$"
    r"|PELVI|ABDOM|KNEE|ANKL|WRIST|ELBOW|SHOULDER|SKULL|FEMUR|TIBIA|HUMER|FINGER|HUFT|HUEFT|BECKEN|KNIE|FUSS|SCHULT"
    r"|SCHADEL|SCHAEDEL|HANCHE|BASSIN|GENOU|EPAULE|RODILLA|HOMBRO|GINOCCH|SPALLA|BACINO|CRANE|CRANI|SINUS|DENTAL|ABD$"
    r"|CLAVIC|STERNUM|SCAPUL|RIPPEN|COSTILLAS"
)


def _words(text: str) -> list[str]:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    plain = re.sub(r"(?<=[a-z]{2})(?=[A-Z])|_", " ", unicodedata.normalize("NFKC", plain)).upper()
    plain = re.sub(r"CHEST|THORAX|TORAX", r" \g<0> ", plain)  # "CHESTPA"
    plain = re.sub(r"\bANTER(?:O|IOR)[\- ]?POSTERIO\w*|\bA[.\- /]{1,2}P\b", "AP", plain)
    plain = re.sub(r"\bPOSTER(?:O|IOR)[\- ]?ANTERIO\w*|\bP[.\- /]{1,2}A\b", "PA", plain)
    plain = re.sub(r"\b(X|CROSS)[\- ]TABLE\b", "XTABLE", plain)
    plain = re.sub(r"\b[LR]T?[.\- ]{1,2}DEC\b", "DECUB", re.sub(r"\b([LR])[.\-]L\b", r"\1L", plain))
    return re.findall(r"[^\W_]+", plain)


def view_of_words(text: str) -> View | None:
    """Return the view that a text names; "SEVERAL": a frontal one and another, as the name of an exam does.

    A film taken from the front of a patient who lies on one side is a decubitus view, not a frontal one; "decubito
    supino" is just a patient in bed.
    """
    words = _words(text)

    def says(pattern: re.Pattern[str]) -> bool:
        return any(pattern.match(word) for word in words)

    if says(_DECUBITUS) and (says(_LATERAL) or not says(_ON_THE_BACK)):
        return "DECUBITUS"
    view: View | None = None
    if (is_ap := says(_AP)) != (is_pa := says(_PA)):
        view = "AP" if is_ap else "PA"
    elif is_pa or says(_FRONTAL):
        view = "FRONTAL"
    aside: View | None = "OBLIQUE" if says(_OBLIQUE) else "LATERAL" if says(_LATERAL) else None
    if not view and not aside and says(_AXIAL):
        return "AXIAL"
    return "SEVERAL" if view and aside else view or aside


def part_of_words(text: str) -> Part:
    """Say whether a text that stands for a part of the body means the chest; "unknown": it says nothing."""
    words = _words(text)
    if any(_SPINE.match(word) for word in words):
        return "other"
    if any(_CHEST.match(word) for word in words):
        return "chest"
    return "unknown" if all(_NO_PART.match(word) for word in words) else "other"


def names_other(text: str) -> bool:
    """Say whether a free text names a part of the body that is not the chest."""
    return any(_SPINE.match(word) or _OTHER_PART.match(word) for word in _words(text))


def other_part_in(text: str) -> bool:
    """Say whether a free text names a part of the body that is not the chest, and not the chest beside it."""
    return names_other(text) and part_of_words(text) != "chest"
