"""Methods by name."""

from ..models.alphaedit.AlphaEdit_main import apply_AlphaEdit_to_model
from ..models.emmet.emmet_main import apply_emmet_to_model
from ..models.ft.ft_main import apply_ft_to_model
from ..models.ike.ike_main import apply_ike_to_model
from ..models.memit.memit_main import apply_memit_to_model
from ..models.rome.rome_main import apply_rome_to_model
from ..models.simie.simie_main import apply_simie_to_model
from ..models.SPHERE.SPHERE_main import apply_SPHERE_to_model
from ..models.ultraedit.ultraedit_main import UltraEditRewriteExecutor

ALG_DICT = {
    "ROME": apply_rome_to_model,
    "MEMIT": apply_memit_to_model,
    "FT": apply_ft_to_model,
    "IKE": apply_ike_to_model,
    "EMMET": apply_emmet_to_model,
    "AlphaEdit": apply_AlphaEdit_to_model,
    "ULTRAEDIT": UltraEditRewriteExecutor().apply_to_model,
    "SimIE": apply_simie_to_model,
    "SPHERE": apply_SPHERE_to_model,
}
