"""The reference's two charts, predictions against what was found, and timetables as pictures."""

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from efficientnet.parallel.pipeline import NONE, Timetable
from experiments.planner.plan import Plan

COLOURS = {'ipu': '#ff6f79', 'dgx': '#6aa84f', 'tpu': '#5b8def', 'this_machine': '#999999'}


def draw_bars(
    axes: Axes, plans: Sequence[Plan], value: str, title: str, published: Mapping[str, Sequence[float]]
) -> None:
    """Draws a bar a system, labelled, and a dash for each published number.

    Args:
        axes: To draw on.
        plans: A system each.
        value: The plan's attribute, such as 'hours'.
        title: Of the chart.
        published: Numbers by the name of the system.
    """
    heights = [getattr(plan, value) for plan in plans]
    places = range(len(plans))
    axes.bar(places, heights, color=[COLOURS[plan.system.family] for plan in plans])
    for place, plan, height in zip(places, plans, heights, strict=True):
        text = f'{height:,.0f}' if height >= 100 else f'{height:.1f}' if height >= 1 else f'{height:.2f}'
        text = text if plan.fits else f'({text})'
        found = published.get(plan.system.name, ())
        top = max((height, *found))
        axes.annotate(text, (place, top), (0, 3), textcoords='offset points', ha='center', fontsize=7)
        axes.plot([place] * len(found), found, 'k_', markersize=18)
    axes.set_xticks(places, [plan.system.title for plan in plans], rotation=40, ha='right', fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.yaxis.set_major_formatter('{x:,g}')
    axes.spines[['top', 'right']].set_visible(False)
    axes.margins(y=0.1)


def draw_deviations(axes: Axes, names: Sequence[str], deviations: Sequence[float], tolerances: Sequence[float]) -> None:
    """Draws how far predictions are off, a bar each, with the allowed band behind.

    Args:
        axes: To draw on.
        names: Of the predictions, top first.
        deviations: Predicted ÷ found − 1.
        tolerances: What is allowed either way.
    """
    for place, (deviation, tolerance) in enumerate(zip(deviations, tolerances, strict=True)):
        hit = abs(deviation) <= tolerance
        axes.barh(place, 200 * tolerance, left=-100 * tolerance, color='#eeeeee', height=0.9)
        axes.barh(place, 100 * deviation, color='#6aa84f' if hit else '#ff6f79', height=0.5)
        outside = (3, 'left') if deviation >= 0 else (-3, 'right')
        axes.annotate(
            f'{deviation:+.1%}',
            (100 * deviation, place),
            (outside[0], 0),
            textcoords='offset points',
            ha=outside[1],
            va='center',
            fontsize=7,
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)  # room for the labels
    axes.axvline(0, color='black', linewidth=0.8)
    axes.set_xlabel('predicted ÷ found − 1, %; allowed in grey', fontsize=8)
    axes.spines[['top', 'right']].set_visible(False)


def draw_timetable(axes: Axes, timing: Timetable, title: str) -> None:
    """Draws a timetable: a column a tick, a row a stage, a colour a micro-batch, forward above backward.

    Args:
        axes: To draw on.
        timing: What to draw.
        title: Of the picture.
    """
    ticks, stages = timing.forward.shape
    count = int(timing.forward.max()) + 1
    colours = colormaps['viridis']
    for stage in range(stages):
        for tick in range(ticks):
            axes.add_patch(Rectangle((tick, stage), 1, 1, facecolor='#f4f4f4', edgecolor='white'))
            for name, table, top in (('f', timing.forward, stage), ('b', timing.backward, stage + 0.5)):
                batch = int(table[tick, stage])
                if batch == NONE:
                    continue
                shade = 0.15 + 0.75 * batch / max(count - 1, 1)
                colour = colours(shade)
                axes.add_patch(Rectangle((tick, top), 1, 0.5, facecolor=colour, edgecolor='white'))
                ink = 'black' if shade > 0.6 else 'white'
                axes.text(tick + 0.5, top + 0.27, f'{name}{batch}', ha='center', va='center', fontsize=6, color=ink)
    axes.set_xlim(0, ticks)
    axes.set_ylim(stages, 0)
    axes.set_yticks([stage + 0.5 for stage in range(stages)], [f'stage {stage}' for stage in range(stages)], fontsize=7)
    axes.set_xticks([tick + 0.5 for tick in range(ticks)], range(ticks), fontsize=6)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=8, loc='left')
