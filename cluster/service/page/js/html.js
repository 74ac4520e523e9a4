/** Preact, its hooks and htm in one place; no other file names the vendored ones. */
import { Fragment, h, render } from "../vendor/preact.js";
import htm from "../vendor/htm.js";

export { useCallback, useEffect, useId, useLayoutEffect, useMemo, useRef, useState } from "../vendor/preact-hooks.js";
export { Fragment, render };
export const html = htm.bind(h);
