"""Messages that are left out."""

import logging

from llava_bidir.common.expected_messages import LOGGED, hide_expected_messages


def test_commands_of_one_process_add_no_filters(caplog):
    hide_expected_messages()
    loggers = [logging.getLogger(name) for name in LOGGED]
    before = [len(logger.filters) for logger in loggers]
    for _ in range(5):
        hide_expected_messages()
    assert [len(logger.filters) for logger in loggers] == before


def test_only_expected_messages_are_left_out(caplog):
    hide_expected_messages()
    for name, beginnings in LOGGED.items():
        logger = logging.getLogger(name)
        logger.warning(f"{beginnings[0]} and more")
        logger.warning(f"heard of {name}")
    assert [record.getMessage() for record in caplog.records] == [
        f"heard of {name}" for name in LOGGED
    ]
