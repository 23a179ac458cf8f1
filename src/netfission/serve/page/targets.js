// Draws answers that are no class of the whole image: labels, numbers, or maps of the classes of pixels.
import { SPACE, bar, bare, make, probability, rounded, setting } from "/common.js";

const DIGITS = 4; // significant ones of numbers
const [SMALL, LARGE] = [1e-6, 1e15]; // beyond them, powers of ten are easier to read than all digits
const WIDTH = 3; // of the line of a number, in standard deviations of the training images to either side

export const isTarget = (answer) => !("class" in answer);

// What is drawn, by what an answer has.
const KINDS = [
  { has: "maps", draw: drawMaps, listed: listedMaps },
  { has: "labels", draw: drawLabels, listed: listedLabels },
  { has: "mean", draw: drawNumbers, listed: listedNumbers },
];
const kindOf = (answer) => KINDS.find(({ has }) => has in answer);

export const draw = (item, model) => kindOf(item.answer).draw(item, model);
export const listedTargets = (answer) => kindOf(answer).listed(answer);

const byShare = (shares) => Object.entries(shares).sort((one, other) => other[1] - one[1]);
function number(value) {
  const size = Math.abs(value);
  const text = size && (size < SMALL || size >= LARGE)
    ? value.toExponential(DIGITS - 1)
    : (value + 0).toLocaleString("en", { maximumSignificantDigits: DIGITS, useGrouping: "min2" }); // -0 + 0 is 0
  return text.replaceAll("-", "\u2212");
}

function definitions(...entries) {
  const list = make("dl", undefined, "uncertainty");
  for (const [term, text] of entries) {
    const group = make("div");
    group.append(make("dt", term, "quiet"), make("dd", text));
    list.append(group);
  }
  return list;
}

/* ---- a class for each pixel ---- */

const occurring = (shares) => byShare(shares).filter(([, share]) => share > 0);

function listedMaps({ shares }) {
  return occurring(shares).slice(0, 3).map(([name, share]) => `${name}${SPACE}${bare(share)}${SPACE}%`).join(", ");
}

function drawMaps(item, model) {
  const { answer, name, url } = item;
  const maps = make("div", undefined, "maps");
  maps.append(
    panel("Photograph", url, name),
    panel("Classes", answer.maps.classes, "the most probable class of each pixel", `${stem(name)}.png`),
    panel("Uncertainty", answer.maps.uncertainty, "the entropy at each pixel: black is certain", `${stem(name)}-uncertainty.png`),
  );
  const rows = occurring(answer.shares).map(([label, share]) => {
    const row = make("li");
    const title = make("span", undefined, "label");
    const swatch = make("span", undefined, "swatch");
    swatch.style.setProperty("--color", model.colors[label]);
    title.append(swatch, label);
    const length = bar(share);
    length.style.setProperty("--bar", model.colors[label]);
    row.append(title, length, make("span", `${bare(share)}${SPACE}%`, "number"));
    return row;
  });
  const legend = make("ol", undefined, "bars", "legend");
  legend.append(...rows);
  return [
    maps,
    make("p", "Uncertainty: black where the prediction is certain, white where all classes are equally probable.", "quiet", "small"),
    make("h3", "Share of each class"),
    legend,
    make("h3", "Mean over pixels"),
    definitions(
      ["Confidence", probability(answer.confidence)],
      ["Exits that disagree", `${bare(answer.disagreement)}${SPACE}% of pairs`],
      ["Total uncertainty", `entropy ${rounded(answer.entropy, 3)} nats`],
      ["From disagreement between exits", `mutual information ${rounded(Math.max(0, answer.mutual_information), 3)} nats`],
    ),
  ];
}

const stem = (name) => name.replace(/\.[^.]*$/, "") || "image";

function panel(title, address, description, file) {
  const figure = make("figure");
  const image = make("img");
  image.alt = description;
  image.src = address;
  const caption = make("figcaption", title, "small");
  if (file) {
    const save = make("a", "save");
    save.href = address;
    save.download = file;
    save.setAttribute("aria-label", `Save ${file}`);
    caption.append(" ", save);
  }
  figure.append(image, caption);
  return figure;
}

/* ---- labels ---- */

function listedLabels({ labels }) {
  return labels.join(", ") || "No label";
}

function drawLabels({ answer }) {
  const verdict = make("div", undefined, "verdict", "predicted");
  verdict.append(make("h2", listedLabels(answer)));
  verdict.append(make("p", "A label is predicted if its probability reaches its threshold.", "small"));
  const list = make("ol", undefined, "bars", "labels");
  for (const [name, share] of byShare(answer.probabilities)) {
    const row = make("li");
    const present = answer.labels.includes(name);
    row.classList.toggle("present", present);
    row.append(make("span", present ? `${name} ✓` : name, "label"), bar(share), make("span", probability(share), "number"));
    list.append(row);
  }
  return [
    verdict,
    make("h3", "Probability of each label"),
    list,
    make("h3", "Mean over labels"),
    definitions(
      ["Total uncertainty", `entropy ${rounded(answer.entropy, 3)} nats`],
      ["From disagreement between exits", `mutual information ${rounded(Math.max(0, answer.mutual_information), 3)} nats`],
      ["Exits that disagree", `${bare(answer.disagreement)}${SPACE}% of pairs`],
    ),
  ];
}

/* ---- numbers ---- */

function listedNumbers({ mean, std }) {
  return Object.keys(mean).map((name) => `${name} ${number(mean[name])}${SPACE}±${SPACE}${number(std[name])}`).join(", ");
}

function drawNumbers({ answer }, model) {
  const promised = "coverage" in answer;
  const list = make("ol", undefined, "numbers");
  model.classes.forEach((name, place) => {
    const row = make("li");
    const line = make("p", undefined, "value");
    line.append(make("span", name, "label"), make("span", `${number(answer.mean[name])}${SPACE}±${SPACE}${number(answer.std[name])}`));
    row.append(line, axis(answer, name, model.scale.mean[place], model.scale.std[place]));
    if (promised) row.append(make("p", `from ${number(answer.low[name])} to ${number(answer.high[name])}`, "small"));
    row.append(make("p", `from disagreement between exits: ±${SPACE}${number(answer.disagreement[name])}`, "quiet", "small"));
    list.append(row);
  });
  const ends = list.querySelector(".beyond-low, .beyond-high") ? " A band with a pointed end goes on beyond the line." : "";
  const interval = promised
    ? `The band is an interval that contains the number of at least ${setting(answer.coverage)} of images that are drawn as the ${model.calibrated_on} were. `
    : "The band is one standard deviation to either side. ";
  const parts = "± is a standard deviation, of which that from disagreement is a part: their squares add up, not they themselves. ";
  return [list, make("p", `${parts}${interval}The line reaches ${WIDTH} standard deviations of the training images to either side of their mean.${ends}`, "quiet", "small")];
}

function axis(answer, name, center, spread) {
  const along = (value) => (value - center) / (2 * WIDTH * spread) + 0.5;
  const place = (value) => Math.min(1, Math.max(0, along(value)));
  const low = answer.low?.[name] ?? answer.mean[name] - answer.std[name];
  const high = answer.high?.[name] ?? answer.mean[name] + answer.std[name];
  const line = make("div", undefined, "axis");
  line.style.setProperty("--low", place(low));
  line.style.setProperty("--high", place(high));
  line.style.setProperty("--mean", place(answer.mean[name]));
  line.classList.toggle("beyond-low", along(low) < 0);
  line.classList.toggle("beyond-high", along(high) > 1);
  line.setAttribute("aria-hidden", "true");
  const ends = make("div", undefined, "ends", "quiet", "small");
  ends.append(make("span", number(center - WIDTH * spread)), make("span", number(center + WIDTH * spread)));
  const both = make("div");
  both.append(line, ends);
  return both;
}
