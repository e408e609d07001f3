r"""The vocabulary of `lite.eval.labels`: what radiologists call things, as tables of regular expressions.

Every pattern is matched against a normalised sentence: lower case, hyphens and underscores turned into spaces, one
space between words. `compile_phrases` anchors every pattern at word boundaries. The tables say *what* is mentioned;
whether it is affirmed, denied or doubted is decided in `labels.py` from the cue tables at the end of this file.

Which words belong to which label follows the CheXpert labeller (Irvin et al. 2019) and its annotators' directions:
heart failure counts as edema and as a doubt about the heart, vascular congestion is only a doubt about edema,
parenchymal scars and interstitial markings are opacities, fibrosis is "Pleural Other", calcified nodules and
granulomas are no lesions, and prostheses, wires and clips are hardware.
"""

from __future__ import annotations

import re


def compile_phrases(*phrases: str) -> re.Pattern[str]:
    """Compile alternatives that match whole words only.

    Args:
        phrases: regular expressions without capturing groups; longer ones first where one begins another.
    """
    return re.compile(r"\b(?:" + "|".join(phrases) + r")(?!\w)")


# --- Findings ---------------------------------------------------------------------------------------------------------

_LINE_NOT = (
    r"(?<!pleural )(?<!fissure )(?<!fissural )(?<!skin )(?<!kerley )(?<!kerley a )(?<!kerley b )(?<!septal )"
    r"(?<!axillary )(?<!paratracheal )(?<!b )(?<!mid )(?<!spinous )(?<!fracture )(?<!in )(?<!first )(?<!clavicular )"
    r"(?<!paraspinal )(?<!interstitial )(?<!stripe )(?<!linear )"
)

FINDINGS: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": (
        r"(?:mediastinal|cardiomediastinal|mediastinum) (?:widening|enlargement)",
        r"(?:widening|enlargement) of (?:the )?(?:\w+ )?(?:mediastinum|mediastinal|cardiomediastinal|cardiomediastinum)"
        r"(?: silhouettes?| contours?| shadow)?",
        r"increased mediastinal width",
        r"mediastinal mass(?:es)?",
    ),
    "Cardiomegaly": (
        r"cardiomeg\w+",
        r"(?:cardiac|heart) enlargement",
        r"enlargement of (?:the )?(?:\w+ )?(?:heart|cardiac silhouette|cardiac shadow|cardiac contours?)",
    ),
    "Lung Lesion": (
        r"nodular (?:\w+ )?(?:opacit\w+|opacification|densit\w+|lesions?|infiltrates?|foci|focus)",
        r"(?:micro)?nodules?",
        r"(?<!body )mass(?:es)?(?! effect)(?: like (?:\w+ )?(?:opacit\w+|consolidation|lesions?|densit\w+|area))?",
        r"cavitary (?:lung )?lesions?",
        r"lesions?",
        r"(?:adeno)?carcinomas?",
        r"neoplas\w+",
        r"tumou?rs?",
        r"malignan\w+",
        r"metasta(?:sis|ses|tic disease)",
        r"(?:lung|pulmonary|bronchogenic) cancer",
    ),
    "Lung Opacity": (
        r"opacit\w+",
        r"opacif\w+",
        r"(?:decreased|reduced) translucency",
        r"(?:increased|increasing|hazy|patchy|focal|ill defined|streaky|linear|vague|basilar|retrocardiac|airspace"
        r"|air space|parenchymal|interstitial|perihilar|confluent|asymmetric) densit\w+",
        r"air ?space (?:disease|process|abnormality|infiltrates?|changes?)",
        r"infiltrat\w+",
        r"(?:interstitial|reticular|reticulonodular|reticulo nodular) (?:lung )?(?:markings?|patterns?|disease"
        r"|prominence"
        r"|abnormalit\w+|thickening|changes?|process|coarsening)",
        r"interstitial lung",
        r"prominence of (?:the )?(?:\w+ )?interstiti(?:al markings|um)",
        r"reticulations?",
        r"(?:parenchymal |fibrotic )?scar(?:s|red|ring)?",
        r"(?:peribronchial|bronchial wall|airway wall|peribronchovascular) thickening",
        r"haziness",
        r"ground glass",
        r"white ?out",
        r"focal (?:parenchymal|pulmonary|lung) (?:abnormalit\w+|process|disease)",
    ),
    "Edema": (
        r"o?edema\w*",
        r"(?:congestive )?(?:heart|cardiac) failure",
        r"chf",
        r"(?:cardiac|cardiovascular) decompensation",
    ),
    "Consolidation": (r"(?:broncho)?consolid\w+",),
    "Pneumonia": (
        r"(?:broncho)?pneumoni(?:a|as|ae|c)",
        r"infect(?:ion|ions|ious|ive)(?: (?:process|etiology))?",
        r"pna",
    ),
    "Atelectasis": (r"at[ea]l[ea]ct[ae]\w*", r"collapsed?", r"collapse of"),
    "Pneumothorax": (
        r"(?:hydro|hemo|haemo)?pn(?:eu|ue|e)mothora\w+",
        r"(?:hydro|hemo|haemo) pneumothora\w+",
        r"pneumo thora\w+",
        r"ptx",
    ),
    "Pleural Effusion": (
        r"effusions?",
        r"pleural (?:\w+ )?fluid(?: collections?)?",
        r"fluid(?: (?:is|was|seen|noted|present|loculated|tracking|again|layering)){0,3} (?:within|in|along) (?:the )?"
        r"(?:\w+ ){0,2}?(?:fissures?|pleural space)",
        r"fissural fluid",
        r"(?:hydro|h[ae]+mo) ?pneumothora\w+",
        r"(?:hydro|h[ae]+mo) ?thora(?:x|ces)",
        r"parapneumonic fluid",
    ),
    "Pleural Other": (
        r"pleural (?:\w+ |and \w+ ){0,2}?(?:thickening|plaques?|scar\w*|calcifications?)",
        r"pleur(?:al|o) ?(?:and )?parenchymal (?:\w+ )?(?:scar\w*|thickening|changes?)",
        r"pleuro ?pericardial scar\w*",
        r"thickening of (?:the )?(?:\w+ )?pleura",
        r"(?:fibrosis|fibrothorax)",
        r"apical (?:cap(?:ping)?|thickening)",
        r"pleural (?:abnormalit\w+|disease)",
    ),
    "Fracture": (r"fract?ures?", r"fractured", r"fx"),
    "Support Devices": (
        r"(?:endotracheal|tracheal|et|ng|og|naso ?gastric|oro ?gastric|naso ?enteric|enteric|feeding|dob ?hof?f|chest"
        r"|pleural|tracheostomy|trach|gastric|gastrostomy|drainage|thoracostomy|nasojejunal|orogastric) tubes?",
        r"tubes?",
        r"tubing",
        r"dob ?hof?f",
        r"tracheostomy",
        r"(?:etts?|ngts?|ogts?|piccs?|cvls?|cvcs?|icds?|aicds?|ppm|iabp|lvad|vad|ecmo|tavr|dht)",
        _LINE_NOT + r"lines?",
        r"catheters?",
        r"(?:porta?(?:cath| a cath)|port a cath|port ?a ?caths?|mediports?|infusaports?|port)",
        r"(?:pacers?|pacemakers?|pace maker|pacing|pacer leads?)",
        r"leads(?! to\b)",
        r"(?:single|dual|triple|right atrial|right ventricular|ventricular|atrial|chamber|biventricular|pacing) lead",
        r"(?:cardioverter )?defibrillators?",
        r"(?<!no acute )devices?",
        r"hardware",
        r"(?:sternotomy |sternal |cerclage |guide ?)?wires?",
        r"(?:surgical )?(?:clips?|sutures?|staples?)",
        r"stents?",
        r"(?:(?:aortic|mitral|tricuspid|pulmonic|prosthetic|mechanical|bioprosthetic) )+valves?"
        r"(?: replacements?| prosthes[ie]s| repair)?(?! calcif)(?! annul)",
        r"valve (?:replacements?|prosthes[ie]s)",
        r"(?:prosthes[ie]s|prosthetic|arthroplast\w+)",
        r"screws?",
        r"(?<!end )(?<!growth )plates?(?! like)(?!like)",
        r"(?:harrington |spinal |fixation )rods?",
        r"(?:spinal|posterior|cervical|thoracic|lumbar) (?:spinal )?fusion",
        r"(?:drains?|pigtails?)",
        r"(?:swan ganz|swan|balloon pump|impella|introducer|sheath|cannulas?|cannulae|coils?|electrodes?)",
        r"(?:stimulators?|generator|generator pack|battery pack|loop recorder|pulse generator)",
        r"(?:support|life support|monitoring) (?:apparatus|equipment|devices?)",
        r"(?:vp |ventriculoperitoneal |ventricular )?shunt",
        r"(?:ivc |vena cava )filter",
        r"(?:is|are|remains?|been) (?:re)?intubated",
    ),
}
"""Phrases that name a finding, per label (all but No Finding)."""

DOUBTFUL_FINDINGS: dict[str, tuple[str, ...]] = {
    "Edema": (
        r"(?:vascular|pulmonary|venous|hilar|interstitial|pulmonary vascular|pulmonary venous|pulmonary vasculature)"
        r" congestion",
        r"congestion",
        r"(?:vessels|vascul\w+|vascular markings)(?: (?:is|are|appears?|remains?))?(?: \w+)? (?:congested|engorged)",
        r"congested (?:\w+ )?(?:vess\w+|vascul\w+)",
        r"(?:pulmonary )?(?:vascular|vessel|interstitial|perihilar|hilar|bronchovascular) indistinctness",
        r"indistinctness of (?:the )?(?:\w+ ){0,2}?(?:vess\w+|vascul\w+|markings)",
        r"indistinct (?:\w+ ){0,2}?(?:vess\w+|vascul\w+|markings)",
        r"(?:pulmonary |(?<!mediastinal ))vascular (?:prominence|engorgement)",
        r"(?:prominence|engorgement) of (?:the )?(?:\w+ ){0,2}?(?:vascul\w+|vess\w+)",
        r"(?:engorged|prominent) (?:\w+ ){0,2}?(?:vascul\w+|vess\w+)",
        r"(?:fluid|volume) overload",
    ),
    "Cardiomegaly": (r"(?:congestive )?(?:heart|cardiac) failure", r"chf"),
    "Pleural Effusion": (
        r"blunt\w*(?: of)?(?: the)?(?: \w+){0,4}? (?:costophrenic|cp|posterior sulc\w+|lateral sulc\w+|sulc\w+)"
        r"(?: (?:angles?|sulc\w+|recess\w*))?",
        r"(?:costophrenic|cp) (?:angles?|sulc\w+)(?: \w+){0,3}? blunt\w+",
    ),
    "Enlarged Cardiomediastinum": (r"(?:mediastinal|cardiomediastinal) (?:prominence|fullness)",),
}
"""Phrases that, affirmed, only make the label uncertain."""

OTHER_FINDINGS: tuple[str, ...] = (
    r"(?:emphysem\w+|copd|bullae?|bullous)",
    r"hyper ?(?:inflat\w+|expan\w+|aerat\w+|lucen\w+)",
    r"(?:scolio\w+|kypho\w+|dextroscoliosis|levoscoliosis)",
    r"(?:degenerat\w+|spondylo\w+|osteophyt\w+|arthr(?:itis|itic|opathy|osis))",
    r"calcifi\w+",
    r"atherosclero\w+",
    r"granulom\w+",
    r"(?:hernia|eventration)\w*",
    r"(?:elevation|elevated) (?:of )?(?:the )?(?:\w+ )?h?emi ?diaphragm\w*",
    r"h?emi ?diaphragm\w* (?:is |are |remains )?(?:\w+ )?(?:elevation|elevated)",
    r"aspiration",
    r"pneumo ?(?:mediastinum|peritoneum|nitis)",
    r"(?:bronchiect\w+|bronchitis|bronchiolitis|asthma|reactive airways?|airways? disease|bronchospasm)",
    r"(?:cephalization|cuffing|hypertension)",
    r"volume loss",
    r"deformit\w+",
    r"(?:h[ae]+morrhag\w+|h[ae]+matoma|contusions?|aneurysm\w*)",
    r"(?:lymph)?adenopathy",
    r"(?:osteopeni\w+|osteoporo\w+)",
    r"thickening",
    r"blunt\w+",
    r"plaques?",
    r"prominen\w+",
    r"(?:bullet|inflammat\w+|tuberculosis|sarcoid\w*|free (?:intraperitoneal )?air)",
    r"(?:compression|wedge|wedging)",
)
"""Abnormalities without a label of their own; affirmed or doubted, they keep a report from "No Finding"."""

EXCLUSIONS: dict[str, tuple[str, ...]] = {
    "Lung Lesion": (
        r"calcified (?:\w+ ){0,3}?(?:nodul\w+|mass(?:es)?|lesions?)",
        r"(?:osseous|bone|bony|lytic|sclerotic|blastic|rib|skin|hepatic|liver|vertebral|skeletal|destructive|humeral"
        r"|breast|soft tissue|abdominal|thyroid|adrenal|renal|chest wall|cardiac)"
        r"(?: (?:and|or) \w+)?(?: \w+)? (?:lesions?|mass(?:es)?|metasta\w+|tumou?rs?|malignan\w+|nodules?|carcinomas?"
        r"|neoplas\w+)",
        r"(?:lesions?|metasta\w+) (?:in|of|within|involving) (?:the )?(?:\w+ ){0,2}?(?:ribs?|bones?|spine|humer\w+"
        r"|vertebra\w*|clavicle|scapula|liver|skeleton)",
        r"(?:history|diagnosis) of (?:\w+ ){0,3}?(?:malignan\w+|carcinomas?|cancer|tumou?r)",
        r"tumou?r (?:markers?|board)",
    ),
    "Lung Opacity": (
        r"pleur(?:al|o) (?:and )?(?:\w+ ){0,2}?scar\w*",
        r"metal\w* opac\w+",
        r"scar (?:markers?)",
        r"interstitial (?:pulmonary |lung )?o?edema",
    ),
    "Edema": (
        r"(?:soft tissue|subcutaneous|body wall|chest wall|cerebral|peripheral|leg|lower extremity|bone|anasarca)"
        r" o?edema",
    ),
    "Pneumonia": (r"(?:wound|urinary|sternal|bloodstream|line|pleural space) infection",),
    "Atelectasis": (
        r"(?:vertebral|vertebra|tracheal|airway|bronchial|chest wall|sinus|compression|lateral|endplate)"
        r"(?: body| wall)? collapse",
        r"collapse of (?:the )?(?:\w+ ){0,2}?(?:vertebra\w*|trachea|endplate|[tl]\d+)",
    ),
    "Pneumothorax": (),
    "Pleural Effusion": (r"(?:pericardial|joint|shoulder|knee|glenohumeral|cardiac) effusions?",),
    "Pleural Other": (r"(?:myelo|cystic|retroperitoneal|hepatic) ?fibrosis", r"cystic fibrosis"),
    "Fracture": (
        r"fractured? (?:of )?(?:the )?(?:\w+ )?(?:wires?|leads?|catheters?|screws?|rods?|hardware|sternotomy wires?)",
        r"(?:wires?|leads?|catheters?|screws?|hardware|lead|wire) fractures?",
    ),
    "Support Devices": (
        r"lines? (?:of|drawn|shadows?)",
        r"(?:hard|straight|edge|dividing|horizontal|vertical|white|thin|visceral pleural|lucent|cardiomediastinal"
        r"|mediastinal|joint|junction|apical pleural|fine|septal|soft tissue|parenchymal|curvilinear) lines?",
        r"plate ?like",
        r"no (?:acute )?support",
        r"(?:gun ?shot|bullet) \w+",
    ),
}
"""Phrases in which a label's words mean something else; a mention that overlaps one is dropped."""

# --- Structures whose state is a statement about a label --------------------------------------------------------------

STRUCTURES: dict[str, tuple[str, ...]] = {
    "Cardiomegaly": (
        r"heart(?! (?:failure|border|borders|valve|valves|rate|transplant|disease|block))(?: size| shadow| silhouette"
        r"| contours?)?",
        r"(?:cardiac|cardiopericardial|cardio pericardial) (?:silhouettes?|size|shadow|contours?|outline|diameter)",
        r"cardiac(?=(?:,| and|,? and|/|\s+/)\s*(?:the )?(?:(?:upper |superior )?mediastin\w+|hilar|pulmonary|vascular"
        r"|aortic|cardiomediastinal))",
        r"cardiothoracic ratio",
        r"cardiac and",
    ),
    "Enlarged Cardiomediastinum": (
        r"(?:cardio ?|superior |upper )?mediastin(?:um|al)(?=(?:(?:,| and|,? and|/) ?(?:the )?"
        r"(?:hilar|hila|cardiac|heart|vascular|pulmonary|aortic|pleural|osseous|bony))*,?"
        r"(?:,? and)?(?: pulmonary)?"
        r" (?:silhouettes?|contours?|borders?|structures?|configuration|shadows?|outlines?|width|size|margins?"
        r"|appearance|and))",
        r"(?:cardio|superior |upper )?mediastinum",
        r"cardiomediastin\w+",
        r"pericardial silhouette",
    ),
    "Lung Opacity": (
        r"(?:lung (?:fields?|bases|apices)|lungs?(?! (?:volumes?|markings|expansion))|hemithorax|(?:pulmonary "
        r"|lung )?parenchyma)",
    ),
    "Pleural Effusion": (
        r"(?:costophrenic|cp) (?:angles?|sulc\w+|recess\w*)",
        r"pleural (?:spaces?|surfaces?|recess\w*)",
        r"pleura",
    ),
    "Edema": (r"(?:pulmonary )?(?:vascularity|vasculature|vascular (?:markings|pattern|pedicle)|vessels)",),
}
"""Anatomy that reports describe as normal or not."""

STRUCTURE_IS_ONLY_A_PLACE = compile_phrases(
    r"(?:over|overlie|overlies|overlying|behind|below|above|near|in|within|through|across|along|beneath|under|beyond"
    r"|projecting over|projects over|abut\w*|obscur\w+|into|from|to|towards?|silhouett\w+|against)"
    r"(?: the)?(?: left| right| superior| upper| mid| lower| anterior| posterior| expected| region of the)?\s*"
)
"""Words that, right before a structure, make it a location."""

ENLARGED = compile_phrases(
    r"enlarge\w*", r"widen\w*", r"wide", r"(?:increased|increase) in (?:size|width)", r"increased", r"dilated", r"big",
    r"(?:above|greater than|larger than) (?:upper limits? of )?normal", r"large", r"(?:mildly|moderately"
    r"|markedly) larger?",
)  # fmt: skip
PROMINENT = compile_phrases(
    r"borderline", r"prominen\w+", r"(?:slightly )?full(?:ness)?",
    r"(?:obscured|exaggerated|accentuated|magnified|limited|suboptimal)",
    r"(?:top|upper) normal (?:to|or) \w+ enlarged",
    r"(?:cannot|can not|can't|not)(?: be)?(?: \w+){0,2}? (?:assessed|evaluated|determined|seen|visuali[sz]ed|measured)",
    r"(?:difficult|limited|hard|suboptimal\w*) (?:to )?(?:\w+ )?(?:assess|evaluat|determine|judge|measure)\w*",
)  # fmt: skip
UNCHANGED = compile_phrases(
    r"(?:stable|stably|unchanged|constant|similar|same)",
    r"(?:not|no)(?: \w+){0,3}? chang\w+",
    r"without(?: \w+){0,2}? change\w*",
)
NORMAL = compile_phrases(
    r"normal(?:ly|ised|ized)?", r"unremarkable", r"within (?:normal |the )?limits?", r"wnl", r"not remarkable",
    r"midline", r"upper limits? of normal", r"negative", r"no (?:acute |focal |significant )?abnormalit\w+",
    r"(?:appropriate|maintained|preserved)", r"nondilated",
)  # fmt: skip
CLEAR = compile_phrases(
    r"clear(?!ed|ing)", r"normal", r"unremarkable", r"within normal limits", r"wnl", r"sharp\w*", r"preserved",
    r"well (?:defined|demarcated|delineated)", r"(?:fully|well) (?:aerated|expanded) and clear",
)  # fmt: skip

# --- Cues -------------------------------------------------------------------------------------------------------------

_CHANGE = (
    r"(?:change[sd]?|changing|increase[sd]?|decrease[sd]?|improve\w*|worsen\w*|progress\w*|evolution|alteration"
    r"|difference|interval change)"
)
_MANNER = (
    r"(?:significant\w*|substantial\w*|appreciabl\w+|interval|relevant|definite|major|marked|notable|obvious|real"
    r"|evident"
    r"|considerabl\w+|clear|apparent|further|gross|short|acute|large|great|much|overall|important|significant interval)"
)
_SEEN = (
    r"(?:seen|identified|visuali[sz]ed|visible|present|evident|apparent|demonstrated|detected|noted|appreciated|found"
    r"|observed|shown|recogni[sz]ed|delineated|discernible|perceived|imaged|in place|confirmed|suspected|suggested)"
)
_BEFORE = r"(?:prior|previous\w*|earlier|before|preceding|the old|old|recent|comparison|the ct|ct|the remote)"

CUES: dict[str, tuple[str, ...]] = {
    # Reads like a negation, is none.
    "keep": (
        rf"(?:no|without|little|not)(?: (?:any|a))?(?: {_MANNER}){{0,3}} {_CHANGE}(?: (?:in|of|to|from))?",
        rf"(?:has|have) not(?: \w+)?(?: {_MANNER})? (?:{_CHANGE}|resolved|cleared|been removed)",
        rf"(?:(?:is|are|was|were) )?not {_SEEN} (?:on|in|at) (?:the )?{_BEFORE}",
        r"not (?:previously|clearly previously) \w+",
        rf"(?:(?:is|are|was|were) )?not {_SEEN} (?:previously|before)",
        r"not (?:only|necessarily|yet)",
        r"not (?:significantly|substantially|appreciably) \w+",
        r"(?:nearly|almost|near|partial|partially|incomplete|incompletely|largely|mostly|virtually|mild|some|slight"
        r"|subtotal|ongoing|slow)"
        r"(?: |\s*)(?:interval )?(?:complete |completely |entirely |total |totally )?"
        r"(?:resolved|resolution|cleared|clearing|clearance)(?: of)?",
        r"(?:document|ensure|confirm|until|assess for|to|demonstrate|for|show|evaluate for)"
        r"(?: the)?(?: complete| interval)? (?:resolution|clearing|clearance)(?: of)?",
        r"no (?:cause|explanation|reason) for",
        r"no doubt",
        r"no(?= (?:evidence of )?(?:hardware|device|line|tube|wire|lead|catheter|procedural) (?:\w+ )?"
        r"(?:complication|failure|loosening|malposition|migration|malfunction|related))",
        r"no further (?:increase|enlargement)",
        r"no enlargement of (?:the )?(?:known|existing|preexisting)",
        r"no less",
    ),
    # Doubt that beats a negation.
    "strong doubt": (
        r"(?:cannot|can not|can't|could not|couldn't|unable to|difficult to|hard to|impossible to)(?: \w+){0,3}?"
        r" (?:exclude\w*|rule out|ruled out|rule \w+ out|confirm)",
        r"(?:does|do|did) not (?:\w+ )?(?:exclude|rule out|preclude)",
        r"(?:not|without) (?:definitively |definitely |entirely |completely |fully )?(?:exclud\w+|ruling out)",
        r"no new(?: or \w+)?(?: (?:focal|areas?|foci|focus|site|region|evidence)(?: of)?)?",
        r"(?:less|least) likely",
        r"no evidence to (?:exclude|rule out)",
    ),
    "deny": (
        r"no longer",
        r"(?:no|nothing|none|without|nor|neither|not|never|absent|denies|lacks?|lack of|absence of|devoid of"
        r"|negative for"
        r"|free of|free from|clear of|cleared of|neg for|sans|failed to|fails to|zero|none of)",
        r"(?:isn't|aren't|doesn't|don't|wasn't|hasn't|haven't)",
        r"(?:rules?|ruled|ruling) out",
        r"(?:argues?|arguing|speaks?|militates?) against",
        r"(?:history|hx) of",
        r"unlikely(?: to)?(?: (?:be|represent|reflect))?",
        r"(?:excludes?|excluding)",
    ),
    # Denies what follows up to the next comma, whatever is doubted there.
    "instead": (r"(?:rather than|instead of|as opposed to)",),
    "doubt": (
        r"(?:may|might|could|would)(?! not)(?: \w+){0,2}? (?:be|represent\w*|reflect\w*|indicate|suggest|relate\w*|have"
        r"|include|contain|also|signify|correspond|account|still|just|well|simply|possibly|be due)(?: \w+)?",
        r"(?:may|might|could|would)",
        r"(?:possib(?:le|ly|ility)|probab(?:le|ly)|potential(?:ly)?|perhaps|maybe|questionabl[ey]|questioned"
        r"|question of"
        r"|question|equivocal|presum\w+|borderline|conceivabl[ey])",
        r"(?:likely|most likely|likelihood)",
        r"(?:suspect\w*|suspicio\w+(?: for| of)?|concern\w*(?: for| of| regarding)?|worrisome for|worrying for"
        r"|worrisome)",
        r"(?:suggest\w*(?: of)?|suggestion)",
        r"(?:favou?r\w*|consider\w*|differential(?: diagnos[ie]s)?)",
        r"(?:to|please|can|and) (?:exclude|rule out|evaluate for|assess for)",
        r"(?:evaluate|evaluation|assess|assessment|correlat\w+)(?: \w+)? for",
        r"r/o",
        r"(?:rule out)",
        r"(?:if|whether|unless)",
        r"in the (?:appropriate|proper|correct|right) clinical (?:setting|context|scenario)",
        r"either",
        r"(?:versus|vs)(?!\.? (?:\d|prior|previous))",
        r"(?:felt|thought|believed) to",
        r"(?:difficult|hard) to (?:assess|evaluate) for",
        r"(?:hint|hints) of",
        r"(?:simulat|mimick?)\w+",
        r"\?",
        r"(?:cannot|can not)",
        r"raise\w* (?:the )?(?:question|possibility|concern)\w*(?: of| for)?",
    ),
    "removed": (
        r"(?:removal|withdrawal|extraction|explantation) of",
        r"(?:removed|explanted|discontinued)(?= (?:\w+ ){0,4}?(?:tubes?|lines?|catheters?|drains?|picc|pacemaker))",
    ),
    "resolved": (
        r"(?:resolution|clearing|clearance|disappearance|evacuation|drainage) of",
        r"(?:resolved|cleared)(?= (?:\w+ ){0,3}?(?:pneumo\w+|effusions?|opacit\w+|atelecta\w+|consolid\w+|o?edema))",
    ),
    # Ends the reach of whatever is open.
    "stop": (
        r"(?:status post|s/p|after|following|since|despite|given|because|as (?:seen|noted|before|described|above)"
        r"|superimposed (?:on|upon)|in (?:this|a) patient|compared|accompanied by"
        r"|which (?:is|are|has|have)|that (?:is|are|has|have)|(?:is|are) (?:again|now)|there (?:is|are)"
        r"|post(?= (?:\w+ ){0,3}(?:placement|removal|insertion|intubation|extubation)))",
        r"(?<!consistent )(?<!compatible )(?<!concerned )(?<!associated )(?<!correlate )(?<!keeping )(?<!line )"
        r"(?<!correlation )(?<!possibly )(?<!probably )(?<!likely )(?<!perhaps )with(?!out|in| (?:no|any))",
    ),
    # Ends a denial, not a doubt: "could be seen in the setting of infection".
    "setting": (r"in the (?:setting|presence) of",),
}
"""Words before a finding that decide its status, in the order in which they are tried."""

FOLLOWING_CUES: dict[str, tuple[str, ...]] = {
    "keep": (
        r"(?:has|have) (?:resolved|cleared)(?= .*\bbut (?:persists?|remains?))",
        rf"(?:is|are|was|were|has|have|had)?(?: been)? ?not(?: been)?(?: \w+)? (?:{_CHANGE}|resolved|cleared|removed)",
        rf"(?:(?:is|are|was|were) )?not {_SEEN} (?:on|in|at) (?:the )?{_BEFORE}",
        rf"(?:(?:is|are|was|were) )?not {_SEEN} (?:previously|before)",
        r"(?:has|have|had|is|are|was|were)?(?: \w+)? ?(?:nearly|almost|partially|incompletely|largely|mostly|virtually)"
        r"(?: (?:completely|entirely|totally))? (?:resolved|cleared)",
    ),
    "doubt": (
        r"(?:cannot|can not|can't|could not|not)(?: \w+){0,3}? (?:exclud\w+|ruled out)",
        r"(?:is|are|be|remains?|remain)(?: also| a| an| still| certainly| now| of)*"
        r" (?:possib\w+|probab\w+|likely|suspected|questioned|questionable|concern|consideration\w*|favou?red"
        r"|considered"
        r"|equivocal|uncertain|indeterminate|presumed|suspicious)"
        r"(?=\s*(?:$|[,;:)]|(?:in|at|given|but|on|and|present|here|as)\b))",
        r"(?:possible|probable|likely|suspected|questioned|questionable|considered|favou?red)(?: present)?\s*$",
        r"(?:difficult|hard|impossible) to (?:exclude|rule out)",
        r"(?:should|could|may|might|can|would|must)(?: \w+)? be (?:considered|present|suspected|excluded|possible"
        r"|entertained"
        r"|seen|missed|overlooked)",
        r"(?:may|might|could|would) (?:also )?(?:have this|have a similar|appear|coexist|contribute|give)",
        r"(?:if any|if present|if at all)",
        r"(?:is|are)(?: also| still)? (?:in|on|within) the differential\w*",
        r"(?:is|are|was|were)?(?: \w+)? ?not (?:well|clearly|fully|completely|adequately|optimally|definitely|reliably)"
        r" \w+",
        r"(?:incompletely|poorly|inadequately|suboptimally) (?:evaluated|assessed|seen|visuali[sz]ed|imaged)",
        r"in the (?:appropriate|proper|correct|right) clinical (?:setting|context|scenario)",
        r"(?:versus|vs)(?!\.? (?:\d|prior|previous))",
        r"less likely\s*$",
    ),
    "deny": (
        rf"(?:is|are|was|were|be|being)?(?: no longer| not)(?: \w+)?(?: {_SEEN}| demonstrated| enlarged)",
        rf"(?:no longer|not) (?:\w+ )?{_SEEN}",
        r"(?:is|are|was|were) (?:absent|negative|excluded|ruled out|gone|not the case)",
        r"(?:is|are|was|were|seems?|appears?|felt to be|thought to be|considered)?(?: \w+)? ?unlikely"
        r"(?=\s*(?:$|[,;:)]|(?:given|in|at|as|and|based|on|but|because)\b))",
        r"(?:has|have) been (?:excluded|ruled out)",
        r"absent",
        r": ?(?:none|absent|negative|nil|no|not \w+)(?=[ ,]*$)",
    ),
    "normal": (
        r"(?:is|are|was|were|appears?|remains?|seems?)(?: \w+){0,2}? (?:normal|unremarkable|within normal limits)",
    ),
    "resolved": (
        r"(?:has|have|had|is|are|was|were)?(?: \w+){0,2}? ?(?:resolved|cleared|disappeared)(?! of)",
        r"(?:complete )?interval (?:resolution|clearing)(?! of)",
        r"with (?:complete )?(?:interval )?resolution",
    ),
    "removed": (
        r"(?:has|have|had|is|are|was|were)?(?: since| now| been| all| both| subsequently| also| interval\w*"
        r"| again){0,4} ?"
        r"(?:removed|explanted|discontinued|taken out|pulled out)",
        r"removal",
    ),
}
"""Words after a finding that decide its status."""

EXTUBATED = compile_phrases(r"(?:has been |been |was |interval )?extubat\w+")
HARD_BREAK = re.compile(
    r"\b(?:but(?! (?:persists?|remains?)\b)(?!(?: \w+ly| otherwise| now| still| is| are| remains?)* (?:clear|normal"
    r"|stable|unchanged|unremarkable|improved)\b)"
    r"|however|although|though|nevertheless|nonetheless|whereas|while|except(?:\s+for|\s+that|ing)?"
    r"|apart\s+from|aside\s+from|other\s+than|with\s+the\s+exception\s+of|besides|albeit)\b|[();]"
)
"""Words after which a new assertion begins."""

# --- Attributes -------------------------------------------------------------------------------------------------------

SIDES: dict[str, tuple[str, ...]] = {
    "bilateral": (
        r"bilateral(?:ly)?", r"bi ?(?:basilar|basal|apical|lateral)(?:ly)?", r"both", r"b/l",
        r"(?:r|right)\s*(?:>|<|=|/|greater than|more than|and|&)\s*(?:l|left)",
        r"(?:l|left)\s*(?:>|<|=|/|greater than|more than|and|&)\s*(?:r|right)",
        r"(?:apices|lung bases|costophrenic angles|hemithoraces)",
    ),
    "left": (r"left", r"lt", r"lul", r"lll", r"lingul\w+",
             r"l(?= (?:sided|pleural|lung|lower|upper|base|basilar|apical|ptx|effusion|picc|ij|subclavian|chest))"),
    "right": (r"right", r"rt", r"rul", r"rml", r"rll", r"middle lobe",
              r"r(?= (?:sided|pleural|lung|lower|upper|middle|base|basilar|apical|ptx|effusion|picc|ij|subclavian"
              r"|chest))"),
}  # fmt: skip
SIDE_OF_SOMETHING_ELSE = compile_phrases(
    r"(?:left|right) (?:sided )?(?:and (?:left|right) )?(?:atri\w+|ventric\w+|heart|main ?stem|main bronch\w+"
    r"|h?emi ?diaphragm\w*|cardiac|brachiocephalic|innominate|anterior oblique|posterior oblique|paratracheal stripe"
    r"|upper quadrant|lower quadrant|pulmonary artery|main pulmonary|aortic|mediastinal|decubitus|bronch\w+|diaphragm)",
    r"(?:rotat\w+|shift\w*|deviat\w+|displac\w+)(?: \w+){0,2}? (?:to|towards?) the (?:left|right)",
    r"(?:to|towards?) the (?:left|right)",
)
"""Sides that belong to anatomy, quadrants or directions, not to a finding."""

ZONES: dict[str, tuple[str, ...]] = {
    "upper": (r"upper", r"apex", r"apices", r"(?:bi)?apical", r"suprahilar", r"[rl]ul", r"apically"),
    "mid": (r"mid", r"middle", r"midlung", r"midzone", r"perihilar", r"rml", r"central", r"lingul\w+"),
    "lower": (
        r"lower", r"bases?", r"bi ?bas(?:al|ilar)", r"bas(?:al|ilar)", r"[rl]ll", r"infrahilar", r"retrocardiac",
        r"costophrenic", r"subpulmonic", r"supradiaphragmatic",
    ),
}  # fmt: skip
SIZES: dict[str, tuple[str, ...]] = {
    "small": (
        r"small(?:er)?", r"tiny", r"trace", r"minimal(?:ly)?", r"mild(?:ly)?", r"slight(?:ly)?", r"minor", r"trivial",
        r"subtle", r"minute", r"miniscule", r"minuscule", r"subcentimeter", r"subcentimetre", r"little",
    ),
    "moderate": (r"moderate(?:ly)?", r"medium", r"moderate sized", r"mild to moderate"),
    "large": (
        r"large", r"severe(?:ly)?", r"marked(?:ly)?", r"massive(?:ly)?", r"extensive(?:ly)?", r"gross(?:ly)?",
        r"substantial(?:ly)?", r"huge", r"sizeable", r"sizable", r"considerabl[ey]", r"giant", r"significantly",
        r"tension", r"complete", r"florid", r"fulminant",
    ),
}  # fmt: skip
SIZE_OF_CHANGE = compile_phrases(
    r"\w+ (?:increas\w+|decreas\w+|improv\w+|worse\w*|more|less|larger|smaller|chang\w+|rotat\w+|displac\w+|limited|low"
    r"|hypo\w+|under\w+|progress\w+|lower|higher|different|degenerat\w+|tortuous|elevat\w+|hyper\w+|deviat\w+)",
    r"(?:mediastinal shift|interval)",
)
"""A degree that belongs to a change or to something else, such as "mildly increased"."""
SIZE_IN_THE_NAME: dict[str, str] = {"nodule": "small", "nodules": "small", "mass": "large", "masses": "large"}

DESCRIPTOR = (
    r"(?:a|an|the|there|small|tiny|trace|minimal|mild|moderate|large|severe|marked|slight|minor|stable|unchanged"
    r"|persistent|persisting|residual|improved|improving|worsening|increased|increasing|decreased|decreasing|interval"
    r"|left|right|bilateral|bibasilar|biapical|both|again|possible|possibly|probable|probably|likely|questionable"
    r"|suspected|low|old|chronic|healed|known|continued|extensive|multiple|scattered|patchy|streaky|linear|otherwise"
    r"|status|re|slightly|mildly|moderately|markedly|unchanged)"
)
"""Words that, opening an item after a comma or "and", show that a negated list is over (unless "or" follows)."""

FINITE = re.compile(
    r"(?<!that )(?<!which )(?<!who )(?<!as )\b(?:is|are|was|were|has|have|remains?|appears?|shows?|demonstrates?"
    r"|persists?"
    r"|terminates?|ends?|projects?|overl(?:ies|ie)|seems?|measures?|reveals?|lies|courses?|extends?|cannot)\b"
    r"|\b(?:there['’]s)\b"
)
ADJECTIVE = re.compile(
    r"\b(?:normal|unremarkable|clear|intact|enlarged|widened|stable|unchanged|within\s+normal\s+limits|wnl|in\s+place"
    r"|in\s+situ|resolved|removed)\b"
)
"""Predicates: two of them on both sides of a comma or "and" make two clauses."""
