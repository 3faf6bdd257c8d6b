"""The shapes world and its judge: pictures, words and tasks with known answers, to measure a model by.

scene (what there is) -> render (pictures), language, questions, edits, plans, motion (words) -> samples (examples of
every task); judge reads pictures back. These need numpy and Pillow alone. evaluate measures a pipeline with them.
"""
