/** Preact, its hooks and htm in one place; no other file names the vendored ones. */

import htm from "../vendor/htm.js";
import { Fragment, h, render } from "../vendor/preact.js";

export { useCallback, useEffect, useId, useLayoutEffect, useMemo, useRef, useState } from "../vendor/preact-hooks.js";
export { Fragment, render };
export const html = htm.bind(h);
