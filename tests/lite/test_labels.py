"""The labeller against hand-labelled sentences in the style of real reports, and against the phantom's grammar.

Expectations are written `label+` (positive), `label-` (negative) or `label?` (uncertain), with side and size behind
where they matter; every label that is not named has to be absent. The sentences were composed for this test and
labelled before the labeller saw them.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.report import write_findings
from lite.eval.labels import LABELS, Label, Mention, Reading, read_labels, read_mentions
from lite.eval.labels.vocabulary import table

SHORT: dict[str, Label] = {
    "nothing": "No Finding",
    "mediastinum": "Enlarged Cardiomediastinum",
    "heart": "Cardiomegaly",
    "lesion": "Lung Lesion",
    "opacity": "Lung Opacity",
    "edema": "Edema",
    "consolidation": "Consolidation",
    "pneumonia": "Pneumonia",
    "atelectasis": "Atelectasis",
    "pneumothorax": "Pneumothorax",
    "effusion": "Pleural Effusion",
    "pleura": "Pleural Other",
    "fracture": "Fracture",
    "devices": "Support Devices",
}
MARKS = {"+": "positive", "-": "negative", "?": "uncertain"}

DENIED = [
    ("The right hemidiaphragm is elevated. Calcified granulomas are seen. No acute infiltrate.", "opacity-"),
    ("COPD with no acute infiltrate.", "opacity-"),
    ("The left effusion is gone.", "effusion-"),
    ("No left effusion.", "effusion-"),
    ("No suspicious nodule, mass or adenopathy.", "lesion-"),
    ("Rib fractures are not identified.", "fracture-"),
    ("No fracture is appreciated on this limited exam.", "fracture-"),
    (
        "There is elevation of the left hemidiaphragm with overlying atelectasis. No evidence of "
        "pneumonia or effusion is seen, and the right lung is clear.",
        "atelectasis+, pneumonia-, effusion-, opacity-",
    ),
    ("Pneumomediastinum and extensive subcutaneous emphysema, without pneumothorax.", "pneumothorax-"),
    ("Pulmonary vascular markings are prominent but there is no frank edema.", "edema-"),
    ("No lung mass is identified. Sclerotic lesion of the left humerus.", "lesion-"),
    ("No pleural thickening or plaques.", "pleura-"),
    ("There is pulmonary fibrosis, with no superimposed consolidation.", "pleura+, consolidation-"),
    ("Mild hyperexpansion. Flattened diaphragms. No infiltrate.", "opacity-"),
    (
        "No definite evidence of pneumothorax or pleural effusion, given limitations of supine technique.",
        "pneumothorax-, effusion-",
    ),
    ("No convincing pneumothorax.", "pneumothorax-"),
    ("No definite lung nodule; 5 mm calcified nodule in the right apex.", "lesion-"),
    ("No pneumonia, vascular congestion, or pleural effusion.", "pneumonia-, edema-, effusion-"),
    ("No lobar consolidation.", "consolidation-, nothing+"),
    ("No consolidations, no effusions.", "consolidation-, effusion-, nothing+"),
    ("Prominent interstitial markings without overt edema.", "opacity+, edema-"),
    ("No evidence of rib fracture, but dedicated rib films are recommended.", "fracture-"),
    ("Bones are osteopenic. No fracture.", "fracture-"),
    ("No significant pleural effusion, no pneumothorax, no pulmonary edema.", "effusion-, pneumothorax-, edema-"),
    ("No fractures are seen within the limits of plain radiography.", "fracture-"),
    ("The lungs are mostly clear.", "opacity-"),
]
LISTS = [
    ("No pneumothorax, small left pleural effusion.", "pneumothorax-, effusion+ left small"),
    ("No pneumothorax and unchanged bibasilar atelectasis.", "pneumothorax-, atelectasis+ bilateral"),
    ("No focal consolidation, large effusion, or pneumothorax.", "consolidation-, effusion-, pneumothorax-, nothing+"),
    ("No consolidation, effusion and pneumothorax.", "consolidation-, effusion-, pneumothorax-, nothing+"),
    ("Possible left effusion, small right pneumothorax.", "effusion? left, pneumothorax+ right small"),
    ("May represent atelectasis, infection, or aspiration.", "atelectasis?, pneumonia?"),
    ("No effusion, ptx, or consolidation", "effusion-, pneumothorax-, consolidation-, nothing+"),
    ("Left effusion, no pneumothorax, right basal atelectasis.", "effusion+ left, pneumothorax-, atelectasis+ right"),
    ("No acute fracture and mild cardiomegaly.", "fracture-, heart+ small"),
]
GONE = [
    ("Tubes and lines have been removed in the interval. No pneumothorax.", "devices-, pneumothorax-"),
    ("The infiltrate seen in the right lower lobe on the prior exam is no longer present.", "opacity-"),
    ("The previously noted infiltrate has nearly resolved.", "opacity+"),
    ("Effusions have resolved bilaterally.", "effusion-"),
    (
        "Interval removal of left IJ line. Right subclavian line unchanged. Feeding tube remains in place.",
        "devices+ right",
    ),
    ("The support devices are unchanged except for removal of the NG tube.", "devices+"),
    (
        "Mediastinal drains and left chest tube were removed. Minimal left apical pneumothorax.",
        "devices-, pneumothorax+ left small",
    ),
    (
        "Pigtail catheter has been removed from the right pleural space. Right effusion has recurred.",
        "devices-, effusion+ right",
    ),
    ("No visible pneumothorax after pigtail catheter removal.", "pneumothorax-, devices-"),
    ("Since the prior radiograph, the right basilar chest tube has been discontinued.", "devices-"),
    ("The right apical chest tube remains in place while the basilar tube has been removed.", "devices+ right"),
    ("Resolving left effusion.", "effusion+ left"),
    (
        "Right middle lobe opacity compatible with pneumonia. Follow-up to resolution is recommended.",
        "opacity+ right, pneumonia+ right",
    ),
    ("Pneumonia has resolved.", "pneumonia-"),
    ("Right lower lobe pneumonia is resolving.", "pneumonia+ right"),
    ("Partially resolved pneumonia.", "pneumonia+"),
    (
        "The previously seen consolidation in the right lower lobe has nearly completely resolved.",
        "consolidation+ right",
    ),
    ("Clearing of left lower lobe consolidation.", "consolidation-"),
    ("Complete interval resolution of the right pneumothorax.", "pneumothorax-"),
    ("The pulmonary edema seen previously has now cleared.", "edema-"),
    ("The left-sided chest tube has been removed with no residual pneumothorax.", "devices-, pneumothorax-"),
    (
        "After removal of the left chest tube, there is a small left apical pneumothorax.",
        "devices-, pneumothorax+ left small",
    ),
    ("Swan-Ganz catheter removed, right IJ introducer sheath remains.", "devices+ right"),
    ("The tip of the NG tube is not visualized.", "devices+"),
    ("ET tube is not seen.", "devices-"),
    ("Opacities have cleared in the right lung but persist on the left.", "opacity+"),
    ("Questionable nodule in the right upper lobe, not seen on the lateral view.", "lesion? right"),
    (
        "Density projecting over the right lower lung is felt to represent a nipple shadow rather than a nodule.",
        "lesion-",
    ),
    ("Basilar opacity is likely due to atelectasis rather than pneumonia.", "opacity+, atelectasis?, pneumonia-"),
    ("The nasogastric tube is no longer visualized. The endotracheal tube is unchanged in position.", "devices+"),
    ("Recommend follow-up radiograph in 6 weeks to document resolution of pneumonia.", "pneumonia+"),
    ("The previously noted left lower lobe opacity is not visualized on today's exam.", "opacity-"),
    ("Previously described right pneumothorax is not appreciated.", "pneumothorax-"),
    ("Opacity in the right upper lobe was not seen on the prior study.", "opacity+ right"),
    ("The right apical pneumothorax has not resolved.", "pneumothorax+ right"),
    ("The left chest tube has not been removed.", "devices+ left"),
]
UNCHANGED = [
    (
        "Stable normal cardiac size and contour. Unremarkable mediastinal silhouette. Clear lungs.",
        "heart-, mediastinum-, opacity-, nothing+",
    ),
    (
        "No focal lung consolidation. No pneumothorax or effusion. Stable right-sided chest XXXX.",
        "consolidation-, pneumothorax-, effusion-",
    ),
    ("Postsurgical changes in the left hemithorax with chain sutures.", "devices+ left"),
    (
        "Unchanged bilateral small effusions and left lower lobe atelectasis.",
        "effusion+ bilateral small, atelectasis+ left",
    ),
    ("Stable left upper lobe nodule, likely granuloma. No new nodule or mass.", "lesion+ left"),
    ("Right apical pleural thickening is stable. No effusion.", "pleura+ right, effusion-"),
    ("A minimal right apical pneumothorax is stable to slightly smaller.", "pneumothorax+ right small"),
    ("Pneumothorax on the left is unchanged, none on the right.", "pneumothorax+ left"),
    ("Degenerative change without fracture.", "fracture-"),
    (
        "Widespread bilateral parenchymal opacities are unchanged. No larger pleural effusions. Moderate cardiomegaly.",
        "opacity+ bilateral, effusion-, heart+ moderate",
    ),
    ("The cardiac silhouette is mildly enlarged but stable.", "heart+ small"),
    ("Mild stable cardiomegaly is seen without superimposed acute process.", "heart+ small"),
    ("Right paratracheal soft tissue thickening, unchanged.", ""),
    ("Mediastinal widening is unchanged compared to the prior.", "mediastinum+"),
    ("Feeding tube, tracheostomy, and left PICC are unchanged.", "devices+ left"),
    ("No change in left apical pneumothorax.", "pneumothorax+ left"),
    ("Without change in the right pneumothorax.", "pneumothorax+ right"),
    ("Pneumothorax unchanged.", "pneumothorax+"),
    ("No enlargement of the known left pneumothorax.", "pneumothorax+ left"),
    ("Effusion is not significantly changed, and there is no pneumothorax.", "effusion+, pneumothorax-"),
    ("Vertebral compression fractures are unchanged.", "fracture+"),
    (
        "Unchanged left lower lobe collapse and pleural effusion. Right lung is essentially clear. No "
        "pneumothorax. ET tube ends 5 cm above the carina.",
        "atelectasis+ left, effusion+ left, opacity-, pneumothorax-, devices+",
    ),
]
DOUBTED = [
    (
        "There are low lung volumes with associated bronchovascular crowding. Patchy right lower lobe "
        "airspace disease, may reflect atelectasis or pneumonia.",
        "opacity+ right, atelectasis?, pneumonia?",
    ),
    ("Chronic appearing blunting of the left costophrenic angle.", "effusion? left"),
    (
        "There is a XXXX opacity in the left midlung, which XXXX represents atelectasis or scar.",
        "opacity+ left, atelectasis?",
    ),
    ("Right upper lobe opacity suspicious for neoplasm.", "opacity+ right, lesion?"),
    ("Findings are concerning for metastatic disease.", "lesion?"),
    ("Possible trace effusions.", "effusion?"),
    ("Suspicion of a right upper lobe nodule.", "lesion? right"),
    ("There is probable nondisplaced fracture of the left 9th rib.", "fracture? left"),
    ("Suspected right rib fracture.", "fracture? right"),
    ("Pneumonia cannot be excluded in the left lower lobe.", "pneumonia? left"),
    ("No radiographic findings of pneumonia; however, subtle early infection could be missed.", "pneumonia?"),
    (
        "Ill-defined opacity in the right upper lung, which could be pneumonia but malignancy is not excluded.",
        "opacity+ right, pneumonia?, lesion?",
    ),
    ("Heterogeneous opacity at the left lung base raises the possibility of pneumonia.", "opacity+ left, pneumonia?"),
    ("While findings may represent atelectasis, pneumonia is also in the differential.", "atelectasis?, pneumonia?"),
    ("Right lower lobe opacity, atelectasis versus infection.", "opacity+ right, atelectasis?, pneumonia?"),
    ("Left basilar atelectasis or infiltrate.", "atelectasis? left, opacity? left"),
    (
        "Complete opacification of the right hemithorax, likely due to a combination of large effusion and collapse.",
        "opacity+ right, effusion?, atelectasis?",
    ),
    ("Bibasilar streaky opacities, left greater than right, likely atelectasis.", "opacity+ bilateral, atelectasis?"),
    (
        "Diffuse bilateral interstitial and airspace opacities, which may reflect ARDS, edema or infection.",
        "opacity+ bilateral, edema?, pneumonia?",
    ),
    (
        "The lung volumes remain low. Minimal blunting of the right costophrenic sinus, potentially "
        "caused by a small pleural effusion.",
        "effusion? right",
    ),
    ("Minimal fluid overload but no overt pulmonary edema.", "edema?"),
    ("Questionable tiny left apical pneumothorax versus skin fold.", "pneumothorax? left"),
    ("Stable right pneumothorax, no new consolidation.", "pneumothorax+ right, consolidation?"),
    ("A rounded opacity in the left lower lobe, nodule not excluded.", "opacity+ left, lesion?"),
    ("Possible aspiration pneumonia.", "pneumonia?"),
    (
        "Findings could represent infection in the correct clinical setting, but atelectasis is also possible.",
        "pneumonia?, atelectasis?",
    ),
    (
        "Patchy opacity in the left lower lobe, likely atelectasis, but infection is not excluded.",
        "opacity+ left, atelectasis?, pneumonia?",
    ),
    ("Atelectasis at the left base, cannot exclude consolidation.", "atelectasis+ left, consolidation?"),
    ("Mild interstitial prominence, may represent mild edema or chronic change.", "opacity+, edema?"),
    ("Pleural thickening or small effusion on the right.", "pleura? right, effusion? right"),
    (
        "Right infrahilar opacity, probably atelectasis, less likely pneumonia.",
        "opacity+ right, atelectasis?, pneumonia?",
    ),
    ("Pneumonia is less likely.", "pneumonia?"),
    ("Findings favor edema over infection.", "edema?, pneumonia?"),
    ("Developing consolidation cannot be ruled out.", "consolidation?"),
    ("Pneumonia or aspiration would have to be considered.", "pneumonia?"),
    ("Atelectasis and/or consolidation at the left base.", "atelectasis? left, consolidation? left"),
    ("Infiltrates vs. edema.", "opacity?, edema?"),
    ("Pulmonary edema, possibly superimposed pneumonia.", "edema+, pneumonia?"),
    (
        "Streaky bibasilar opacities which may be secondary to atelectasis but developing pneumonia is also possible.",
        "opacity+ bilateral, atelectasis?, pneumonia?",
    ),
    ("Kerley B lines are present, suggesting interstitial edema.", "edema?"),
    (
        "No definite focal consolidation. Subtle opacity in the lingula could be due to atelectasis or "
        "early infection.",
        "consolidation-, opacity+ left, atelectasis?, pneumonia?",
    ),
    ("These findings could be seen in the setting of infection.", "pneumonia?"),
    ("Recommend chest CT to exclude an underlying mass.", "lesion?"),
    ("A skin fold overlies the right hemithorax, simulating a pneumothorax.", "pneumothorax?"),
    ("Loculated right pleural effusion versus pleural thickening.", "effusion? right, pleura?"),
    ("Possible nondisplaced right rib fracture.", "fracture? right"),
    ("Engorged pulmonary vessels.", "edema?"),
    ("Tiny bilateral pleural effusions, if any, are unchanged.", "effusion?"),
    ("Pneumothorax cannot be excluded on this supine film.", "pneumothorax?"),
    ("No pneumothorax is visible, but a small pneumothorax cannot be excluded on supine radiograph.", "pneumothorax?"),
]
HEART = [
    (
        "Heart size and vascularity normal. These contour normal. Lungs clear. No pleural effusions or pneumothoraces.",
        "heart-, edema-, opacity-, effusion-, pneumothorax-, nothing+",
    ),
    (
        "Normal heart size. Clear, hyperaerated lungs. No pneumothorax, pleural effusion, or suspicious "
        "focal air space opacity.",
        "heart-, opacity-, pneumothorax-, effusion-",
    ),
    (
        "Mild cardiomegaly. Scattered XXXX opacities in the lung bases, XXXX scarring or atelectasis.",
        "heart+ small, opacity+, atelectasis?",
    ),
    ("Heart is enlarged. Pulmonary XXXX are normal. No focal infiltrates or effusions.", "heart+, opacity-, effusion-"),
    (
        "Mediastinal contours are normal. Lungs are clear. There is no pneumothorax or large pleural effusion.",
        "mediastinum-, opacity-, pneumothorax-, effusion-, nothing+",
    ),
    ("Interstitial edema with small effusions and cardiomegaly.", "edema+, effusion+ small, heart+"),
    ("Cardiomegaly and interstitial pulmonary edema.", "heart+, edema+"),
    ("There is no widening of the mediastinum. Aortic knob is preserved.", "mediastinum-"),
    ("The mediastinum is not enlarged.", "mediastinum-"),
    ("Mediastinal contours appear widened, likely related to AP technique.", "mediastinum+"),
    (
        "Cardiac silhouette is enlarged, likely due to a combination of cardiomegaly and pericardial effusion.",
        "heart+",
    ),
    (
        "The heart is not enlarged, and the mediastinal contours are within normal limits. Both lungs "
        "are well aerated without evidence of infiltrate or mass.",
        "heart-, mediastinum-, opacity-, lesion-",
    ),
    (
        "Findings suggest mild congestive heart failure with small bilateral pleural effusions.",
        "edema?, heart?, effusion+ bilateral small",
    ),
    ("Cardiomegaly with findings of mild CHF.", "heart+, edema+ small"),
    (
        "The sternotomy wires are intact, and there is a prosthetic aortic valve. Moderate cardiomegaly persists.",
        "devices+, heart+ moderate",
    ),
    ("Clear lungs, normal heart size.", "opacity-, heart-, nothing+"),
    ("The cardiac, mediastinal, and hilar contours appear stable.", "heart?, mediastinum?"),
    ("Heart size and mediastinal contours are stable.", "heart?, mediastinum?"),
    ("Cardiomediastinal contours are stable in appearance with mild cardiomegaly.", "mediastinum?, heart+ small"),
    ("Heart size is within normal limits given AP technique.", "heart-"),
    ("Slight prominence of the mediastinum is likely due to patient rotation.", "mediastinum?"),
    ("Mediastinum is widened, as before.", "mediastinum+"),
    ("Tortuous aorta. No mediastinal widening. Heart is within normal limits in size.", "mediastinum-, heart-"),
    ("The heart size is normal, but the aorta is unfolded.", "heart-"),
    ("Evaluation of heart size is limited.", "heart?"),
    ("Marked cardiomegaly with pericardial effusion not excluded.", "heart+ large"),
    ("COMPARISON: None. The heart is enlarged. No effusion.", "heart+, effusion-"),
    (
        "Normal size of the cardiac silhouette. Normal hilar and mediastinal structures.",
        "heart-, mediastinum-, nothing+",
    ),
    ("Normal lung volumes. Normal size of the heart. No pneumonia.", "heart-, pneumonia-, nothing+"),
    ("Size of the cardiac silhouette is at the upper range of normal.", "heart-"),
    ("Heart size cannot be adequately assessed.", "heart?"),
    ("The heart is top normal to mildly enlarged.", "heart?"),
    (
        "Cardiac and mediastinal silhouettes are stable with the cardiac silhouette being mildly enlarged.",
        "heart+ small, mediastinum?",
    ),
    ("Mild to moderate cardiomegaly, larger than on the prior exam.", "heart+ moderate"),
    ("Post CABG mediastinal widening.", "mediastinum+"),
    ("Aortic knob is calcified. Mediastinal contour otherwise normal.", "mediastinum-"),
    (
        "Heart is mildly enlarged, with vascular congestion and small bilateral effusions. There is "
        "also a possible left retrocardiac consolidation.",
        "heart+ small, edema?, effusion+ bilateral small, consolidation? left",
    ),
    (
        "Borderline heart size. Normal pulmonary vascularity. Clear lungs. No pneumothorax or pleural "
        "effusion. Mild degenerative disc disease.",
        "heart?, edema-, opacity-, pneumothorax-, effusion-",
    ),
    ("There is no consolidation or effusion and the heart is not enlarged.", "consolidation-, effusion-, heart-"),
    ("Mild cardiomegaly, no edema.", "heart+ small, edema-"),
    ("Mild cardiomegaly without edema, effusion, or pneumonia.", "heart+ small, edema-, effusion-, pneumonia-"),
    (
        "Heart size is normal. Large right pleural effusion. Mild left basal atelectasis.",
        "heart-, effusion+ right large, atelectasis+ left small",
    ),
    (
        "Mild to moderate pulmonary oedema with enlarged heart and bilateral pleural effusions.",
        "edema+ moderate, heart+, effusion+ bilateral",
    ),
    (
        "The lungs appear clear. Heart, mediastinum and hila are unremarkable.",
        "opacity-, heart-, mediastinum-, nothing+",
    ),
    ("Lung fields are clear. Cardiac shadow is normal.", "opacity-, heart-, nothing+"),
    ("Cardiothoracic ratio is increased.", "heart+"),
    ("Heart: enlarged. Lungs: no infiltrate.", "heart+, opacity-"),
    (
        "Heart size is enlarged. There is tortuosity of the thoracic aorta. No XXXX of pleural "
        "effusion. Lungs are clear.",
        "heart+, effusion-, opacity-",
    ),
    ("Stable cardiomegaly with central vascular congestion.", "heart+, edema?"),
    ("No evidence for acute pneumonia or CHF.", "pneumonia-, edema-, heart-"),
]
DEVICES = [
    ("Left mastectomy. Surgical clips in the left axilla.", "devices+ left"),
    ("Pacemaker generator overlies the left chest.", "devices+ left"),
    ("Triple-lumen catheter tip in the distal SVC. No complication.", "devices+"),
    ("The Port-A-Cath has its tip near the cavoatrial junction.", "devices+"),
    ("Portable AP chest. No PICC seen.", "devices-"),
    ("Right-sided chest tube has been placed to water seal; no pneumothorax.", "devices+ right, pneumothorax-"),
    (
        "A right apical chest tube is present. There is a persistent right basilar pneumothorax.",
        "devices+ right, pneumothorax+ right",
    ),
    ("Right pleural drain with small residual fluid.", "devices+ right"),
    ("Patient is intubated. The endotracheal tube is low, near the carina.", "devices+"),
    (
        "Interval placement of a left chest tube with decrease in the left pneumothorax, now small. "
        "Left basilar opacity may be due to contusion or aspiration.",
        "devices+ left, pneumothorax+ left small, opacity+ left",
    ),
    ("Lines and tubes: ETT 4 cm above carina. NGT in stomach. Right IJ in SVC.", "devices+"),
    ("Right internal jugular Cordis. Left subclavian dialysis catheter.", "devices+ left"),
    ("No hardware complication in the cervical spine.", "devices+"),
    (
        "Small right apical pneumothorax, decreased from prior. Right chest tube and left PICC in place.",
        "pneumothorax+ right small, devices+ bilateral",
    ),
    ("Pacer wires are seen in the right atrium and right ventricle.", "devices+"),
    ("Single-lead pacemaker with its tip over the right ventricle.", "devices+"),
    ("Left chest wall dual lead pacer.", "devices+ left"),
    ("No pacemaker.", "devices-"),
    ("Interval placement of bilateral chest tubes.", "devices+ bilateral"),
    ("Interval repositioning of the endotracheal tube.", "devices+"),
    ("The Dobbhoff catheter has been replaced by a nasogastric tube.", "devices+"),
    ("Surgical clips project over the left axilla.", "devices+ left"),
    ("Left breast prosthesis.", "devices+ left"),
    ("Distal tip of the left PICC cannot be clearly visualized.", "devices+ left"),
    ("Status post ORIF of the left clavicle with plate and screws.", "devices+ left"),
    ("Nasal cannula tubing overlies the chest.", "devices+"),
    ("EKG leads overlie the chest. No pneumothorax.", "devices+, pneumothorax-"),
    ("VP shunt catheter courses over the right chest.", "devices+ right"),
    ("IVC filter in place. No active disease.", "devices+"),
    ("Left ventricular assist device.", "devices+"),
    ("Tracheostomy. Clear lungs.", "devices+, opacity-"),
    ("ETT, NGT, R IJ in situ.", "devices+"),
    ("Monitoring and support devices are constant.", "devices+"),
    ("Sternal wires and mediastinal clips are in place.", "devices+"),
    ("A fractured sternal wire is noted.", "devices+"),
    ("Nonobstructive bowel gas. Cholecystectomy clips.", "devices+"),
]
PLACES = [
    ("Bilateral perihilar opacities compatible with edema.", "opacity+ bilateral, edema+"),
    ("Large left pleural effusion with associated left lung collapse.", "effusion+ left large, atelectasis+ left"),
    ("The lungs demonstrate bilateral, right greater than left, alveolar opacities.", "opacity+ bilateral"),
    ("Mild-moderate pulmonary edema.", "edema+ moderate"),
    ("Improving right lower lobe infiltrate.", "opacity+ right"),
    ("Bilateral pneumothoraces, small on the right and large on the left.", "pneumothorax+ bilateral large"),
    ("Decrease in the right pleural effusion.", "effusion+ right"),
    (
        "Multiple bilateral rib fractures, some of which are acute. Small left hemopneumothorax.",
        "fracture+ bilateral, pneumothorax+ left small, effusion+ left small",
    ),
    ("7 mm nodular density overlying the right 5th anterior rib, not definitely seen previously.", "lesion+ right"),
    (
        "Opacification of the left lung base, consistent with effusion and atelectasis.",
        "opacity+ left, effusion+ left, atelectasis+ left",
    ),
    (
        "There has been no interval development of pneumothorax following thoracentesis, and the right "
        "effusion is decreased.",
        "pneumothorax-, effusion+ right",
    ),
    ("Left-sided effusion has decreased after thoracentesis without pneumothorax.", "effusion+ left, pneumothorax-"),
    ("There is a moderate-size left pneumothorax without tension.", "pneumothorax+ left moderate"),
    ("No pneumothorax on the right; tiny left apical pneumothorax.", "pneumothorax+ left small"),
    ("Moderate left and trace right pleural effusions.", "effusion+ bilateral moderate"),
    ("Pleural effusions, small on the right, moderate on the left.", "effusion+ bilateral moderate"),
    ("Small left effusion has increased to moderate in size.", "effusion+ left moderate"),
    ("There is consolidation at both lung bases.", "consolidation+ bilateral"),
    ("Consolidation throughout the left lung.", "consolidation+ left"),
    ("Patchy consolidation, predominantly in the right lower lobe.", "consolidation+ right"),
    ("Airspace consolidation in the lingula.", "consolidation+ left"),
    ("In the left lower lobe there is a new consolidation.", "consolidation+ left"),
    ("On the right, there is a large effusion.", "effusion+ right large"),
    ("Left rib fractures and right pneumothorax.", "fracture+ left, pneumothorax+ right"),
    ("Acute fracture of the left lateral sixth rib.", "fracture+ left"),
    ("Displaced left clavicle fracture is again noted.", "fracture+ left"),
    ("No acute fracture. Old healed left rib fractures.", "fracture+ left"),
    ("Mild left pleural effusion with subsequent areas of basal atelectasis.", "effusion+ left small, atelectasis+"),
    (
        "No evidence of pneumonia, no pulmonary edema. Minimal scarring at the left lung base.",
        "pneumonia-, edema-, opacity+ left",
    ),
    ("Moderate right hydropneumothorax.", "pneumothorax+ right moderate, effusion+ right moderate"),
    ("Left hemothorax.", "effusion+ left"),
    ("Tension pneumothorax on the left.", "pneumothorax+ left"),
    ("Right pneumothorax, approximately 2.5 cm at the apex.", "pneumothorax+ right"),
    ("There is a right lateral pneumothorax, small in size.", "pneumothorax+ right small"),
    ("Trace pneumothorax at the left apex.", "pneumothorax+ left small"),
    ("Small bilateral effusions, left larger than right.", "effusion+ bilateral small"),
    ("Layering right greater than left pleural effusions.", "effusion+ bilateral"),
    ("Bilateral pleural effusions, large on the right and moderate on the left.", "effusion+ bilateral large"),
    ("Pleural effusion, right.", "effusion+ right"),
    ("Right-sided and smaller left-sided effusions.", "effusion+ bilateral"),
    ("There is no right effusion; the left effusion is moderate.", "effusion+ left moderate"),
    ("No right pleural effusion. Small left pleural effusion.", "effusion+ left small"),
    ("Free-flowing left pleural fluid.", "effusion+ left"),
    ("There is a small subpulmonic effusion on the right.", "effusion+ right small"),
    ("Mass in the right lung apex measuring 5 x 4 cm.", "lesion+ right"),
    ("Small nodules bilaterally.", "lesion+ bilateral small"),
    ("Increased size of known left upper lobe mass.", "lesion+ left"),
    ("Tumor burden in the right lung has increased.", "lesion+ right"),
    ("Bronchopneumonia in the left lower lobe.", "pneumonia+ left"),
    ("Linear atelectasis is seen at both lung bases.", "atelectasis+ bilateral"),
]
OTHER_MEANINGS = [
    ("1. No acute radiographic cardiopulmonary process.", "nothing+"),
    ("Alveolar edema has progressed.", "edema+"),
    ("Asymmetric pulmonary edema, right more than left.", "edema+"),
    ("Small calcified nodule in the left apex consistent with old granulomatous disease.", ""),
    ("T12 compression fracture is age indeterminate.", "fracture+"),
    ("Mild wedging of mid thoracic vertebra.", ""),
    ("Negative chest. No evidence of tuberculosis.", "nothing+"),
    ("No radiographic evidence for active tuberculosis.", "nothing+"),
    ("Mild biapical pleural-parenchymal scarring, right greater than left.", "pleura+"),
    ("Normal chest radiograph.", "nothing+"),
    ("No radiographic evidence of acute cardiopulmonary disease.", "nothing+"),
    ("There is mild leftward mediastinal shift.", ""),
    ("The cardiac borders are obscured.", ""),
    ("Soft tissue mass in the anterior mediastinum.", ""),
    ("Fluid is seen in the minor fissure.", "effusion+"),
    ("Pulmonary metastases are larger.", "lesion+"),
    ("Bilateral hilar prominence.", ""),
    ("Diffuse opacities most consistent with pulmonary edema.", "opacity+, edema+"),
    ("No cardiopulmonary abnormality. No pleural or parenchymal abnormality.", "nothing+"),
    ("No active disease.", "nothing+"),
    ("Scattered calcified pleural plaques. Minimal right apical pleural thickening.", "pleura+"),
    ("Small amount of fluid tracking along the minor fissure.", "effusion+"),
    ("Chronic interstitial lung disease.", "opacity+"),
    ("There is a lytic lesion in the right fifth rib.", ""),
    ("Osseous metastases.", ""),
    ("Age-indeterminate compression fracture of T11.", "fracture+"),
    ("Pulmonary edema has worsened.", "edema+"),
    ("Mild cephalization.", ""),
    ("Opacity overlying the cardiac silhouette on the lateral view.", "opacity+"),
    ("Large hiatal hernia.", ""),
]
REPORTS = [
    (
        "The trachea is midline. The cardio mediastinal silhouette is normal. The lungs are clear, "
        "without focal consolidation or effusion. There is no pneumothorax. The visualized bony "
        "structures reveal no acute abnormalities.",
        "mediastinum-, opacity-, consolidation-, effusion-, pneumothorax-, nothing+",
    ),
    (
        "AP chest radiograph shows the tracheostomy tube in standard position and a left-sided PICC "
        "with tip in the low SVC. Small to moderate layering bilateral pleural effusions with adjacent "
        "bibasilar atelectasis are little changed, and there is persistent mild pulmonary edema. "
        "Cardiac silhouette is enlarged but unchanged. There is no pneumothorax.",
        "devices+ left, effusion+ bilateral moderate, atelectasis+ bilateral, edema+ small, heart+, pneumothorax-",
    ),
    (
        "Since the prior examination, the left lower lobe opacity has cleared and the small right "
        "effusion is no longer evident. New linear opacity at the right base is probably atelectasis.",
        "opacity+ right, effusion-, atelectasis?",
    ),
    (
        "Lungs are hypoinflated. No consolidation, effusion, edema, or pneumothorax. The heart is "
        "mildly enlarged allowing for low lung volumes. Old right clavicle fracture.",
        "consolidation-, effusion-, edema-, pneumothorax-, heart+ small, fracture+ right",
    ),
    ("INDICATION: Pneumothorax, chest tube.\n\nSmall left effusion remains.", "effusion+ left small"),
    (
        "REASON FOR EXAM: r/o pneumonia\nFINDINGS: Lungs clear.\nIMPRESSION: No pneumonia.",
        "opacity-, pneumonia-, nothing+",
    ),
    (
        "There has been interval worsening of the bilateral airspace opacities, right more so than "
        "left. ET tube and right IJ line are in satisfactory position.",
        "opacity+ bilateral, devices+ right",
    ),
    (
        "FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n\n INDICATION:  ___F with new onset ascites  // "
        "eval for infection\n\n TECHNIQUE:  Chest PA and lateral\n\n COMPARISON:  None.\n\n FINDINGS: \n\n "
        "There is no focal consolidation, pleural effusion or pneumothorax.  Bilateral\n nodular "
        "opacities that most likely represent nipple shadows. The\n cardiomediastinal silhouette is "
        "normal.  Clips project over the left lung,\n potentially within the breast.\n\n IMPRESSION: \n\n No "
        "acute cardiopulmonary process.",
        "consolidation-, effusion-, pneumothorax-, opacity+ bilateral, lesion+ bilateral, mediastinum-, devices+ left",
    ),
    (
        "PA and lateral views of the chest provided. Lung volumes are low. There is bronchovascular "
        "crowding and mild bibasilar atelectasis. No convincing signs of pneumonia or edema. No large "
        "effusion or pneumothorax. Cardiomediastinal silhouette appears grossly within normal limits. "
        "Imaged osseous structures are intact.",
        "atelectasis+ bilateral small, pneumonia-, edema-, effusion-, pneumothorax-, mediastinum-",
    ),
    (
        "In comparison with the study of ___, there is little overall change. Monitoring and support "
        "devices remain in place. Continued enlargement of the cardiac silhouette with pulmonary "
        "vascular congestion and bilateral pleural effusions with compressive atelectasis at the bases.",
        "devices+, heart+, edema?, effusion+ bilateral, atelectasis+",
    ),
    (
        "In comparison with the study of ___, there is no evidence of post procedure pneumothorax. The "
        "opacification at the right base is less prominent, though there is still some residual pleural "
        "fluid.",
        "pneumothorax-, opacity+ right, effusion+",
    ),
    (
        "As compared to the previous radiograph, the lung volumes have slightly decreased. The "
        "pre-existing bilateral areas of atelectasis are unchanged. There is no evidence of "
        "pneumothorax. Unchanged size of the cardiac silhouette. The monitoring and support devices are "
        "in constant position.",
        "atelectasis+ bilateral, pneumothorax-, heart?, devices+",
    ),
    (
        "As compared to the previous radiograph, there is no relevant change. Moderate cardiomegaly "
        "with mild fluid overload. No pleural effusions. No pneumonia.",
        "heart+ moderate, edema?, effusion-, pneumonia-",
    ),
    (
        "The patient has received a new right PICC line. The course of the line is unremarkable, the "
        "tip of the line projects over the mid SVC. There is no evidence of complications, notably no "
        "pneumothorax. Otherwise the radiograph is unchanged.",
        "devices+ right, pneumothorax-",
    ),
    (
        "Tip of endotracheal tube projects 4 cm above the carina, and a nasogastric tube courses below "
        "the diaphragm with tip out of view. Worsening bilateral perihilar and basilar airspace "
        "opacities, which may represent pulmonary edema, aspiration, or multifocal pneumonia. Suspected "
        "small left effusion. No visible pneumothorax.",
        "devices+, opacity+ bilateral, edema?, pneumonia?, effusion? left small, pneumothorax-",
    ),
    (
        "The heart is normal in size and contour. There is no mediastinal widening. The lungs are clear "
        "bilaterally. No large pleural effusion or pneumothorax. The XXXX are intact.",
        "heart-, mediastinum-, opacity-, effusion-, pneumothorax-, nothing+",
    ),
    (
        "The cardiomediastinal silhouette is within normal limits for appearance. No focal areas of "
        "pulmonary consolidation. No pneumothorax. No pleural effusion. Mild degenerative changes of "
        "the thoracic spine. No acute, displaced rib fractures.",
        "mediastinum-, consolidation-, pneumothorax-, effusion-, fracture-",
    ),
    (
        "Low lung volumes are present. The heart size and pulmonary vascularity appear within normal "
        "limits. Lungs are free of focal airspace disease. No pleural effusion or pneumothorax is seen.",
        "heart-, edema-, opacity-, effusion-, pneumothorax-, nothing+",
    ),
    (
        "Calcified mediastinal XXXX. No focal areas of consolidation. No suspicious pulmonary "
        "opacities. Heart size within normal limits. No pleural effusions. There is no evidence of "
        "pneumothorax. Degenerative changes thoracic spine.",
        "consolidation-, opacity-, heart-, effusion-, pneumothorax-",
    ),
    (
        "1. BORDERLINE CARDIOMEGALY. 2. MILD PULMONARY EDEMA WITH SMALL BILATERAL PLEURAL EFFUSIONS. 3. "
        "NO PNEUMOTHORAX.",
        "heart?, edema+ small, effusion+ bilateral small, pneumothorax-",
    ),
    (
        "1. INTERVAL PLACEMENT OF A RIGHT INTERNAL JUGULAR LINE, WITHOUT PNEUMOTHORAX. 2. PERSISTENT "
        "LEFT LOWER LOBE OPACITY, WHICH MAY REPRESENT ATELECTASIS OR CONSOLIDATION.",
        "devices+ right, pneumothorax-, opacity+ left, atelectasis?, consolidation?",
    ),
    (
        "1. SINGLE AP VIEW OF THE CHEST DEMONSTRATES LEFT CHEST WALL PORT WITH TIP IN THE SUPERIOR VENA "
        "CAVA. STABLE CARDIOMEDIASTINAL SILHOUETTE. 2. NO FOCAL CONSOLIDATION.",
        "devices+ left, mediastinum?, consolidation-",
    ),
    (
        "SMALL LEFT PNEUMOTHORAX, NOT SIGNIFICANTLY CHANGED. LEFT CHEST TUBE IN PLACE.",
        "pneumothorax+ left small, devices+ left",
    ),
    (
        "Single portable view of the chest. A left pectoral pacemaker is again seen with leads in the "
        "expected positions. There are low lung volumes, which accentuate the bronchovascular markings. "
        "Given this, there is no overt pulmonary edema. Streaky left basilar opacity is most suggestive "
        "of atelectasis; however, infection is difficult to exclude. No large effusion or pneumothorax.",
        "devices+ left, edema-, opacity+ left, atelectasis?, pneumonia?, effusion-, pneumothorax-",
    ),
    (
        "The XXXX are clear bilaterally. Specifically, no evidence of focal consolidation, "
        "pneumothorax, or pleural effusion. Cardio mediastinal silhouette is unremarkable. Visualized "
        "osseous structures of the thorax are without acute abnormality.",
        "consolidation-, pneumothorax-, effusion-, mediastinum-, nothing+",
    ),
    (
        "The cardiac silhouette and mediastinum size are within normal limits. There is no pulmonary "
        "edema. There is no focal consolidation. There are no XXXX of a pleural effusion. There is no "
        "evidence of pneumothorax.",
        "heart-, mediastinum-, edema-, consolidation-, effusion-, pneumothorax-, nothing+",
    ),
    (
        "Lungs are clear. There is no pneumothorax or pleural effusion. The heart and mediastinum are "
        "within normal limits. Bony structures are intact. Right-sided Port-A-Cath tip in the SVC.",
        "opacity-, pneumothorax-, effusion-, heart-, mediastinum-, devices+ right, nothing+",
    ),
    (
        "Right basilar opacity has worsened and now obscures the right hemidiaphragm, concerning for "
        "developing pneumonia, possibly with a small parapneumonic effusion.",
        "opacity+ right, pneumonia?, effusion?",
    ),
    (
        "Patient is status post right upper lobectomy with expected postoperative changes and small "
        "right pleural effusion, unchanged. Surgical clips in the right hilum.",
        "effusion+ right small, devices+ right",
    ),
    (
        "Endotracheal tube should be advanced by 2 cm. Right internal jugular central venous line with "
        "tip at the cavoatrial junction. No pneumothorax identified.",
        "devices+ right, pneumothorax-",
    ),
    (
        "AP portable upright view of the chest. Endotracheal tube terminates approximately 3 cm above "
        "the carina. Enteric tube tip is not well seen but extends below the diaphragm. Moderate "
        "bilateral pleural effusions with bibasilar atelectasis are unchanged. Mild pulmonary edema is "
        "slightly improved. No pneumothorax.",
        "devices+, effusion+ bilateral moderate, atelectasis+ bilateral, edema+ small, pneumothorax-",
    ),
    (
        "Cardiac silhouette remains moderately enlarged. The aorta is tortuous. Mediastinal contours "
        "are otherwise unremarkable. There is no pulmonary vascular congestion. Streaky opacities in "
        "the lung bases likely reflect atelectasis. No focal consolidation, pleural effusion or "
        "pneumothorax is present. No acute osseous abnormality is detected.",
        "heart+ moderate, mediastinum-, edema-, opacity+, atelectasis?, consolidation-, effusion-, pneumothorax-",
    ),
    (
        "The heart is normal in size. The mediastinum is unremarkable. The lungs are clear. There is no "
        "pneumothorax or pleural effusion. No acute bony abnormality.",
        "heart-, mediastinum-, opacity-, pneumothorax-, effusion-, nothing+",
    ),
    (
        "Frontal and lateral views of the chest were obtained. There has been interval placement of a "
        "right-sided pigtail catheter with decrease in size of the right pleural effusion, now small. "
        "There is no appreciable pneumothorax.",
        "devices+ right, effusion+ right small, pneumothorax-",
    ),
    (
        "As compared to the previous radiograph, the patient has been extubated and the nasogastric "
        "tube has been removed. There is no evidence of complications, notably no pneumothorax.",
        "devices-, pneumothorax-",
    ),
    (
        "The lungs are clear without focal consolidation. No pleural effusion or pneumothorax is seen. "
        "The cardiac and mediastinal silhouettes are unremarkable.",
        "opacity-, consolidation-, effusion-, pneumothorax-, heart-, mediastinum-, nothing+",
    ),
    ("1. Small left pneumothorax.\n2. No pleural effusion.", "pneumothorax+ left small, effusion-"),
    ("HISTORY: Pneumothorax.\nFINDINGS: No pneumothorax.", "pneumothorax-"),
    ("Heart size normal\nLungs clear\nNo effusion", "heart-, opacity-, effusion-, nothing+"),
    (
        "HEART SIZE IS NORMAL. LUNGS ARE CLEAR. NO PNEUMOTHORAX OR EFFUSION.",
        "heart-, opacity-, pneumothorax-, effusion-, nothing+",
    ),
]


def expectations(text: str) -> dict[Label, tuple[str, set[str]]]:
    """Parse "effusion+ left small, pneumothorax-"."""
    expected: dict[Label, tuple[str, set[str]]] = {}
    for item in filter(None, text.split(", ")):
        name, *attributes = item.split()
        expected[SHORT[name[:-1]]] = (MARKS[name[-1]], set(attributes))
    return expected


@pytest.mark.parametrize(
    ("text", "expected"),
    DENIED + LISTS + GONE + UNCHANGED + DOUBTED + HEART + DEVICES + PLACES + OTHER_MEANINGS + REPORTS,
)
def test_reads_what_a_radiologist_reads(text: str, expected: str) -> None:
    readings = read_labels(text)
    wanted = expectations(expected)
    got = {label: reading.status for label, reading in readings.items()}
    statuses = {label: wanted[label][0] if label in wanted else "absent" for label in LABELS}
    if "No Finding" not in wanted:
        statuses["No Finding"] = got["No Finding"]
    assert got == statuses
    for label, (_, attributes) in wanted.items():
        assert attributes <= {readings[label].side, readings[label].size}


def test_reads_the_grammar_of_the_phantom_without_a_single_error() -> None:
    for seed in range(7_000_000, 7_002_000):
        report = write_findings(sample_study(seed), np.random.default_rng([seed, 2]))
        assert read_labels(report.text) == dict(report.readings), report.text


def test_a_mention_points_into_the_report() -> None:
    text = "FINDINGS:\n  Small\n left-sided  pleural\n effusion.\tNo pneumo-\nthorax, but a PTX."
    mentions = read_mentions(text)
    assert [text[mention.start : mention.end] for mention in mentions] == [mention.text for mention in mentions]
    assert [mention.status for mention in mentions] == ["positive", "negative", "positive"]
    assert mentions[0] == Mention(
        label="Pleural Effusion",
        status="positive",
        side="left",
        zone=None,
        size="small",
        text="effusion",
        start=text.index("effusion"),
        end=text.index("effusion") + len("effusion"),
    )


def test_lines_end_as_windows_ends_them() -> None:
    text = "INDICATION: Pneumothorax.\r\n\r\nFINDINGS:\r\nSmall left\r\neffusion.\r\nHeart size normal\r\nNo edema\r\n"
    statuses = {m.label: m.status for m in read_mentions(text)}
    assert statuses == {"Pleural Effusion": "positive", "Cardiomegaly": "negative", "Edema": "negative"}


def test_characters_whose_lower_case_is_longer_do_not_move_the_mentions() -> None:
    text = "İİİ\u00a0— No “pneumothorax”… ﬁne"
    (mention,) = read_mentions(text)
    assert (mention.text, mention.status) == ("pneumothorax", "negative")
    assert text[mention.start : mention.end] == "pneumothorax"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("No effusion. Possible effusion. Small effusion.", "positive"),
        ("No effusion. Possible effusion.", "uncertain"),
        ("No effusion.", "negative"),
        ("Nothing of the kind.", "absent"),
    ],
)
def test_positive_wins_over_uncertain_over_negative(text: str, status: str) -> None:
    assert read_labels(text)["Pleural Effusion"].status == status


def test_attributes_unite_over_the_mentions_that_decide() -> None:
    readings = read_labels("Small right effusion. Large left effusion. Possible moderate effusion.")
    assert readings["Pleural Effusion"] == Reading(status="positive", side="bilateral", zone=None, size="large")
    readings = read_labels("Left upper lobe nodule. Left lower lobe nodule.")
    assert readings["Lung Lesion"] == Reading(status="positive", side="left", zone=None, size="small")


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("Left PICC with tip in the right atrium.", "left"),
        ("Left pacemaker with leads in the right atrium and right ventricle.", "left"),
        ("Endotracheal tube in the right mainstem bronchus.", None),
        ("Trachea is deviated to the left. Endotracheal tube in place.", None),
        ("Right chest tube. Left chest tube.", "bilateral"),
    ],
)
def test_anatomy_on_the_way_gives_a_device_no_side(text: str, side: str | None) -> None:
    assert read_labels(text)["Support Devices"].side == side


@pytest.mark.parametrize(
    ("text", "zone"),
    [
        ("Nodule in the right upper lobe.", "upper"),
        ("RLL nodule.", "lower"),
        ("Nodule at the left lung apex.", "upper"),
        ("Perihilar nodule on the right.", "mid"),
        ("Nodule.", None),
    ],
)
def test_zones(text: str, zone: str | None) -> None:
    assert read_labels(text)["Lung Lesion"].zone == zone


def test_no_finding_ignores_devices_but_not_abnormalities_without_a_label() -> None:
    assert read_labels("Endotracheal tube in place. Lungs are clear.")["No Finding"].status == "positive"
    assert read_labels("No emphysema. Heart size is normal.")["No Finding"].status == "positive"
    assert read_labels("Emphysema. Heart size is normal.")["No Finding"].status == "absent"
    assert read_labels("Possible pneumonia.")["No Finding"].status == "absent"


def test_every_table_of_phrases_is_keyed_by_labels() -> None:
    assert set(table("findings")) == set(LABELS) - {"No Finding"}
    for name in ("doubtful_findings", "exclusions", "structures"):
        assert set(table(name)) < set(LABELS)


@pytest.mark.parametrize("text", [None, "", " \n\t ", "___", "...", "XXXX XXXX", "12345", "心臓は正常"])
def test_text_that_says_nothing_is_a_report_without_findings(text: str | None) -> None:
    assert read_mentions(text) == []
    assert read_labels(text) == {
        label: Reading(status="positive" if label == "No Finding" else "absent") for label in LABELS
    }


@pytest.mark.parametrize(
    "unit",
    ["a", " ", "\n", ".", "no ", "effusion ", "no effusion, ", "left right and ", "the heart the mediastinum ",
     "NO EFFUSION\n", "a ? ", "chest, ", "indication: findings: ", "No effusion. ", "mediastinal and hilar, "],
)  # fmt: skip
def test_time_grows_in_proportion_to_the_text(unit: str) -> None:
    start = time.process_time()
    read_labels(unit * (100_000 // len(unit)))
    # CPU time: 0.1 to 1 s on a slow core; anything quadratic takes many minutes.
    assert time.process_time() - start < 60
