/** The log files of a run; the last lines, followed while it runs. */
import { getLogs } from "../endpoints.js";
import { bytes } from "../format.js";
import { useResource } from "../hooks.js";
import { html, useEffect, useRef, useState } from "../html.js";
import { Empty, Failure, Loading } from "../ui.js";

const LINES = 1000;
// biome-ignore lint/suspicious/noControlCharactersInRegex: these are what a terminal reads
const COLORS = /\u001b\[[0-9;]*[A-Za-z]/g; // of a terminal

/** @param {{ id: string; running: boolean }} props */
export function Logs({ id, running }) {
  const wanted = new URLSearchParams(location.hash.split("?")[1] || "").get("file");
  const [file, setFile] = useState(wanted);
  const [wrap, setWrap] = useState(true);
  const [follow, setFollow] = useState(true);
  const box = useRef(/** @type {HTMLElement | null} */ (null));
  const files = useResource((signal) => getLogs(id, {}, signal), [id]);
  const names = files.data?.files || [];
  const chosen = names.some((one) => one.name === file)
    ? file
    : (names.find((one) => /driver|job/.test(one.name)) || names[0])?.name;
  const log = useResource(
    (signal) => (chosen ? getLogs(id, { file: chosen, lines: LINES }, signal) : Promise.resolve(null)),
    [id, chosen],
    { poll: running && follow ? 3000 : 0 },
  );
  useEffect(() => {
    if (follow && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [log.data, follow]);
  if (files.error) return html`<${Failure} error=${files.error} again=${files.reload} />`;
  if (!files.data) return html`<${Loading} lines=${4} />`;
  if (!names.length)
    return html`<${Empty} title="No logs yet"><p>Logs appear once the run's processes have started.</p><//>`;
  return html`<div class="stack">
    <div class="filters">
      <label class="check">
        File <select class="inline" onChange=${(e) => setFile(e.target.value)}>
          ${names.map(
            (one) =>
              html`<option value=${one.name} selected=${one.name === chosen}>
                ${one.name} (${bytes(one.bytes)})
              </option>`,
          )}
        </select>
      </label>
      <label class="check">
        <input type="checkbox" checked=${wrap} onChange=${(e) => setWrap(e.target.checked)} />Wrap lines
      </label>
      <label class="check">
        <input type="checkbox" checked=${follow} onChange=${(e) => setFollow(e.target.checked)} />Follow
      </label>
    </div>
    ${log.error && html`<${Failure} error=${log.error} again=${log.reload} />`}
    ${
      log.data?.truncated &&
      html`<p class="small muted">The last ${LINES} lines; the complete file is in the run's folder, under logs.</p>`
    }
    <pre class="log mono ${wrap ? "wrapped" : ""}" tabindex="0" ref=${box} aria-label="Log ${chosen}">
      ${log.data ? (log.data.lines ?? []).join("\n").replace(COLORS, "") || "(empty)" : "…"}
    </pre>
  </div>`;
}
