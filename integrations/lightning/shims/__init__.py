"""Where Lightning has no hook: functions that stand in for its methods, and each use of its private parts.

Every private part is used in one file, which says what is lost without it.
"""
