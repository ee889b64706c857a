# SPDX-License-Identifier: Apache-2.0
"""`model.generate(custom_generate=FOLDER, trust_remote_code=True, ...)`: see `r2_generate`."""

from r2dllm_ext.integrations.transformers import generate_from_folder


def generate(model, **arguments):
    return generate_from_folder(model, **arguments)
