def assert_prepared(model, profile="peft"):
    raise NotImplementedError
