import pytest

from lorasmith.config import LoraConfig, RunConfig, load_run_config, parse_override, to_yaml
from lorasmith.errors import ConfigError


def read(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_run_config(path, {})


def test_flags_go_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {learning_rate: 1e-4, num_epochs: 2}\n")
    config = load_run_config(path, dict([parse_override("train.learning_rate=2e-4")]))
    assert (config.train.learning_rate, config.train.num_epochs) == (2e-4, 2)


def test_a_resolved_config_reads_back_as_itself(tmp_path):
    config = RunConfig(lora=LoraConfig(target_modules=["q_proj"], init_lora_weights="gaussian"))
    assert read(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {learnin_rate: 1}", "unknown key train.learnin_rate; did you mean 'learning_rate'?"),
        ("trian: {seed: 1}", "unknown key trian; did you mean 'train'?"),
        ("train: {batch_size: 1.5}", "train.batch_size: input should be a valid integer"),
        ("train: {batch_size: '8'}", "train.batch_size: input should be a valid integer"),
        ("train: {batch_size: true}", "train.batch_size: input should be a valid integer"),
        ("train: {batch_size: 0}", "train.batch_size: input should be greater than 0"),
        ("train: {learning_rate: .nan}", "train.learning_rate: input should be a finite number"),
        ("train: {seed: -1}", "train.seed: input should be greater than or equal to 0"),
        ("lora: {lora_dropout: 1.0}", "lora.lora_dropout: input should be less than 1"),
        ("lora: {r: 100000}", "lora.r: input should be less than or equal to 4096"),
        ("train: {early_stopping_patience: 2}", "set eval_steps too"),
        ("- a list", "a config is a mapping"),
        ("a: 1\na: 2", "the key 'a' stands twice"),
        ("a: &x 1\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.system [ls]", "tags (!!name) are not allowed"),
        ("a:\n\t- b", "cannot start any token"),
    ],
)
def test_a_wrong_config_is_told_with_its_place(tmp_path, text, told):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert told in str(caught.value)
    assert "run.yaml" in str(caught.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match="there is no config file"):
        load_run_config(tmp_path / "none.yaml", {})


def test_an_override_needs_a_value():
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        parse_override("train.seed")
