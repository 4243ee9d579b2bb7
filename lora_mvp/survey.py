from lora_mvp.images import look
def survey(paths, cache=None, **options):
    return [look(p, **options) for p in paths]
