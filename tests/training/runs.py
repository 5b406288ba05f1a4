"""What tests of the trainer share: a tiny dataset, settings, and a batch's examples."""

from tests.tiny import picture
from visual_ground import GroundingTrainingArguments
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset

TEMPLATE = "{% for m in messages %}w50 {{ m.content }} w51 {% endfor %}{% if add_generation_prompt %}w52 {% endif %}"
ROWS = [{"image": picture(i), "caption": f"w{10 + i} w{20 + 2 * i} w9"} for i in range(12)]


def arguments(tmp_path, **changes):
    settings = dict(output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2)
    settings |= dict(save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1, seed=3)
    return GroundingTrainingArguments(**{**settings, **changes})


def examples(model, rows=ROWS, count=4):
    dataset = ExampleDataset(rows, sample=False)
    return ExampleCollator(model, concat_captions_prob=0.0)([dataset[i] for i in range(count)])
