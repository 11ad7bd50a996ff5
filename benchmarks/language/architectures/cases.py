"""The cases: model types of transformers with one of their classes each, the important ones first."""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

EVERY_CLASS = (
    "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM",
)  # fmt: skip
IF_NONE_YET = (
    "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "SEMANTIC_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION", "MASK_GENERATION", "CTC", "RNNT", "TDT",
    "AUDIO_CLASSIFICATION", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "DEPTH_ESTIMATION", "IMAGE_TO_IMAGE",
    "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "POSE_ESTIMATION", "VIDEO_CLASSIFICATION", "TIME_SERIES_PREDICTION",
    "VISUAL_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING", "TABLE_QUESTION_ANSWERING", "IMAGE_MATTING", "DECISION",
    "RETRIEVAL", "TEXT_ENCODING", "CAUSAL_IMAGE_MODELING", "MASKED_IMAGE_MODELING", "PRETRAINING", "TEXT_RECOGNITION",
    "TABLE_RECOGNITION", "POINTMAP_ESTIMATION", "NORMAL_ESTIMATION",
)  # fmt: skip
BASE = "MODEL"  # the task of base models, of types that have no other class
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText",
    "MULTIMODAL_LM": "AutoModelForMultimodalLM",
    "SEQ_TO_SEQ_CAUSAL_LM": "AutoModelForSeq2SeqLM",
    "SPEECH_SEQ_2_SEQ": "AutoModelForSpeechSeq2Seq",
    "MASKED_LM": "AutoModelForMaskedLM",
    "IMAGE_CLASSIFICATION": "AutoModelForImageClassification",
    "OBJECT_DETECTION": "AutoModelForObjectDetection",
    "UNIVERSAL_SEGMENTATION": "AutoModelForUniversalSegmentation",
    "SEMANTIC_SEGMENTATION": "AutoModelForSemanticSegmentation",
    "CTC": "AutoModelForCTC",
    "AUDIO_CLASSIFICATION": "AutoModelForAudioClassification",
    "DEPTH_ESTIMATION": "AutoModelForDepthEstimation",
    "ZERO_SHOT_IMAGE_CLASSIFICATION": "AutoModelForZeroShotImageClassification",
    "MASK_GENERATION": "AutoModelForMaskGeneration",
    "ZERO_SHOT_OBJECT_DETECTION": "AutoModelForZeroShotObjectDetection",
    BASE: "AutoModel",
}


class Case(NamedTuple):
    """A model type, the name of one of its classes, and the task that this class is for."""

    model_type: str
    class_name: str
    task: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.model_type}:{self.class_name}"

    @property
    def model_class(self) -> Any:
        """The class."""
        return getattr(transformers, self.class_name)

    @property
    def auto_class(self) -> Any:
        """The auto class of the task, or the class itself where there is none."""
        return getattr(transformers, AUTO_CLASSES.get(self.task, ""), self.model_class)


def all_cases() -> list[Case]:
    """Return every class for the tasks of language models, and one class of each other type."""
    cases: dict[str, Case] = {}
    for task in (*EVERY_CLASS, *IF_NONE_YET, BASE):
        known = set() if task in EVERY_CLASS else {case.model_type for case in cases.values()}
        for model_type, names in classes_for(task).items():
            case = Case(model_type, names if isinstance(names, str) else names[0], task)
            if model_type not in known and model_type in CONFIG_MAPPING:
                cases.setdefault(case.key, case)
    return list(cases.values())


def classes_for(task: str) -> dict[str, str | tuple[str, ...]]:
    """Return the classes of a task by model type, one name or several."""
    name = "MODEL_MAPPING_NAMES" if task == BASE else f"MODEL_FOR_{task}_MAPPING_NAMES"
    return dict(getattr(modeling_auto, name, {}))
