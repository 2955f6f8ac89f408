"""An audit as JUnit XML: one test case per check and parameter, for CI systems that show such files."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from audits.outcomes import Outcome, ResultRow
from audits.report import AuditReport
from registry_models.untrusted_text import for_xml


def junit_xml(report: AuditReport) -> str:
    """Return the report as JUnit XML.

    ``fail`` rows of severity fail are failures, ``inconclusive`` ones errors, ``skipped`` ones skipped; warnings pass
    and say so in ``system-out``.
    """
    counts = report.counts
    name = f"{report.identity.model_name or 'model'} v{report.identity.model_version or '?'}"
    suite = ET.Element(
        "testsuite",
        name=for_xml(f"gradaudit {name}"),
        tests=str(len(report.rows)),
        failures=str(counts["fail"]),
        errors=str(counts["inconclusive"]),
        skipped=str(counts["skipped"]),
        time=f"{report.seconds:.3f}",
    )
    for row in report.rows:
        _case(suite, row)
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ET.Element, row: ResultRow) -> None:
    where = [row.parameter or "model", row.phase, f"step {row.step}" if row.step is not None else None, row.lane]
    case = ET.SubElement(
        suite, "testcase", classname=for_xml(row.check), name=for_xml(" · ".join(str(w) for w in where if w))
    )
    text = for_xml(" ".join(part for part in (row.message, row.where_to_look) if part))
    match row.counted:
        case Outcome.FAIL:
            ET.SubElement(case, "failure", message=for_xml(row.message)).text = text
        case Outcome.INCONCLUSIVE:
            ET.SubElement(case, "error", message=for_xml(row.message)).text = text
        case Outcome.SKIPPED:
            ET.SubElement(case, "skipped", message=for_xml(row.cause or row.message))
        case Outcome.WARN:
            waived = for_xml(f"Waived: {row.waiver}. ") if row.waiver else ""
            ET.SubElement(case, "system-out").text = f"{waived}{text}"
