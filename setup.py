"""Builds the one native file. What else there is to say is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lading.transport._engine",
            ["src/lading/transport/_engine.c"],
            extra_compile_args=["-O2", "-pthread"],
            extra_link_args=["-pthread"],
            py_limited_api=True,
            optional=True,  # without a C compiler the same is done in Python
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
