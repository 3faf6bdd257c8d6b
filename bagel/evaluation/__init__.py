"""The shapes world and its judge: images, words and tasks with known answers, to measure a model by.

scene (what there is) -> render (images), language, questions, edits, plans, motion (words) -> samples (examples of
every task); judge reads images back. These need numpy and Pillow alone. evaluate measures a pipeline with them.
"""
