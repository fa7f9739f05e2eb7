"""Which kind of images a pipeline generates."""

from support.pipelines import fresh

from t2i_spo_plugin.pipelines import pipeline_domain


def test_the_domain_of_a_pipeline_stands_in_its_text_encoder():
    pipe = fresh("sd1")
    assert pipeline_domain(pipe) == "photo"
    pipe.text_encoder.config.spo_domain = "sticker"
    assert pipeline_domain(pipe) == "sticker"
